"""matplotlib with its default settings, independent of the user's environment and settings files."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Draws with matplotlib's defaults. Ignores the variable MPLBACKEND, which may name a backend that only a notebook has, and
    the user's matplotlibrc, which may ask for LaTeX. Warnings of matplotlib are no errors, whatever PYTHONWARNINGS says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _without_variable("MPLBACKEND") if "matplotlib" not in sys.modules else contextlib.nullcontext():
            import matplotlib.style
        with matplotlib.style.context("default"):
            yield


@contextlib.contextmanager
def _without_variable(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
