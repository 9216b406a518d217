"""The settings of torch that this library needs, inside programs that have other settings."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

_imported_by = os.getpid()
DEVICE_TYPES = ("cpu", "cuda")  # for which autocast may be on


@contextlib.contextmanager
def default_state() -> Iterator[None]:
    """Single precision, also in products of matrices, the CPU as default device, no autocast, gradients on, no inference mode
    and no demand for deterministic algorithms. Afterwards the settings of the program are restored.

    The default data type, the precision of products and that demand belong to the process: threads that compute at the same
    time see them change, if the program has set them to something else.
    """
    _prepare_after_fork()
    with contextlib.ExitStack() as stack:
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        stack.enter_context(_full_products())
        if torch.are_deterministic_algorithms_enabled():
            only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
            torch.use_deterministic_algorithms(False)
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=only_warn)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        yield


@contextlib.contextmanager
def side_by_side() -> Iterator[Callable]:
    """A function such as ``map`` that does as many things at once as torch has threads; torch itself uses one inside.

    For many short operations: threads that share one of them wait for each other longer than they compute, and results depend
    on how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            yield map
        else:
            with ThreadPoolExecutor(threads) as pool:
                yield pool.map
    finally:
        torch.set_num_threads(threads)


def threads_share_parts() -> bool:
    """Whether threads should share parts of a computation, and not each operation in it.

    So it is where threads of OpenMP sleep when they have nothing to do (:mod:`DivRegNetLib.run.threads`): to wake them takes
    as long as a short operation. Elsewhere they would spin beside the threads that share the parts.
    """
    return torch.get_num_threads() > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def computed_in_parts(compute: Callable, parts: Iterable) -> list:
    """What a function returns for each of some parts, in order; without gradients where threads share them, see
    :func:`threads_share_parts`."""
    parts, inference = list(parts), torch.is_inference_mode_enabled()
    if len(parts) == 1 or not threads_share_parts():
        return [compute(part) for part in parts]

    def in_mode(part: object) -> object:
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            return compute(part)

    with side_by_side() as run:
        return list(run(in_mode, parts))


@contextlib.contextmanager
def _full_products() -> Iterator[None]:
    """Products of matrices, and convolutions on the CPU, are not rounded to bfloat16 or TF32 inside."""
    backends = [torch.backends.mkldnn, torch.backends.cuda]
    kinds = [getattr(b, name, None) for b in backends for name in ("matmul", "conv")]
    kinds = [kind for kind in kinds if hasattr(kind, "fp32_precision")]
    if kinds:  # PyTorch 2.9 and later
        before = [(kind, kind.fp32_precision) for kind in kinds if kind.fp32_precision in ("bf16", "tf32")]
        for kind, _ in before:
            kind.fp32_precision = "ieee"
        try:
            yield
        finally:
            for kind, precision in before:
                kind.fp32_precision = precision
    else:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def _prepare_after_fork() -> None:
    """In a forked process the threads of OpenMP are gone, and GNU's library would wait for them forever: one thread."""
    global _imported_by
    if os.getpid() != _imported_by:
        torch.set_num_threads(1)
        _imported_by = os.getpid()
