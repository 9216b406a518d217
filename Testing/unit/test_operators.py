"""What a forward pass asks of a GPU: few operations, none that it has to be waited for, and no choice made by the data."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from operators import AsOnGpu, operators
from textures import deformed
from torch.fx.experimental.proxy_tensor import make_fx

from DivRegNetLib import models
from DivRegNetLib.core import fields
from DivRegNetLib.core.recording import Recorder
from DivRegNetLib.registration import methods
from DivRegNetLib.registration.methods import Images
from DivRegNetLib.registration.regnet import RegNet, RegNetConfig

SHAPE = (48, 48, 48)  # large enough for all levels; the number of operations does not depend on it
MOST_KERNELS = {"variational": 5000, "discrete+variational": 5650, "variational+regnet": 5550}


def images(seed: int, *, masks: bool = False) -> Images:
    moving, fixed, _ = deformed(SHAPE, 1.5, seed=seed)
    measured = torch.ones_like(fixed, dtype=torch.bool)
    measured[..., :3] = False
    mask = torch.zeros_like(measured)
    mask[..., 4:-4, 4:-4, 2:-2] = True
    valid = measured, torch.ones_like(measured)
    return Images(fixed, moving, *((mask, mask) if masks else (None, None)), valid, int(measured.sum()))


@pytest.fixture(scope="module")
def model() -> models.Model:
    """The bundled model, and an untrained RegNet, as it has none."""
    loaded = models.load(models.DEFAULT)
    config = RegNetConfig(channels=(8, 16, 32, 32), integration_steps=4, guided=True)
    with torch.random.fork_rng(devices=[]):
        return replace(loaded, regnet=RegNet(config, loaded.card.variational_settings).eval())


class OnCuda(AsOnGpu):
    """A tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda:0")


def deform(model: models.Model, pair: Images, names: str, **settings) -> torch.Tensor:
    return methods.deform(
        pair, tuple(names.split("+")), replace(model.card.variational_settings, **settings), model.regnet
    )


@pytest.mark.parametrize("names", MOST_KERNELS)
def test_a_forward_pass_has_few_operations_and_waits_for_none(model, names):
    tensors, rebuild = images(0, masks=True).taken_apart()
    pair = rebuild([None if t is None else t.as_subclass(AsOnGpu) for t in tensors])
    deform(model, pair, names)  # fills the caches of small matrices
    counted = operators(lambda: deform(model, pair, names))
    assert not counted.waits
    assert 0.9 * MOST_KERNELS[names] < sum(counted.kernels.values()) <= MOST_KERNELS[names]


def test_where_it_is_not_known_how_much_was_measured_that_is_waited_for_once(model):
    pair = replace(images(0), measured=None)
    deform(model, pair, "variational", steps=5)
    counted = operators(lambda: deform(model, pair, "variational", steps=5))
    assert counted.waits == {"_local_scalar_dense": 1}


def test_what_is_waited_for_is_noticed():
    x = torch.arange(4.0)
    assert operators(lambda: x.sum().item()).waits == {"_local_scalar_dense": 1}
    assert operators(lambda: x[x > 2]).waits
    assert operators(lambda: (x > 2).nonzero()).waits
    assert operators(lambda: torch.bincount(x.long())).waits
    assert operators(lambda: x.new_tensor([1.0, 2.0])).waits
    assert not operators(lambda: x[1:] + 2 * x.sum()).waits


@pytest.mark.parametrize("names", ["variational", "variational+regnet"])
def test_the_operations_are_the_same_for_all_images_of_a_shape(model, names):
    """So they can be recorded once, as a CUDA graph is, and played again for other images."""
    first, second = images(1), images(2)

    def run(fixed: torch.Tensor, moving: torch.Tensor, *valid: torch.Tensor) -> torch.Tensor:
        pair = Images(fixed, moving, valid=valid, measured=first.measured)
        return deform(model, pair, names, steps=5, min_voxels=1)

    with torch.no_grad():
        recorded = make_fx(run)(first.fixed, first.moving, *first.valid)
        played = recorded(second.fixed, second.moving, *second.valid)
        torch.testing.assert_close(played, run(second.fixed, second.moving, *second.valid), atol=0, rtol=0)
        assert (played - run(first.fixed, first.moving, *first.valid)).abs().max() > 0.5


@pytest.mark.parametrize("names", ["variational", "variational+regnet"])
def test_what_a_recorded_forward_pass_reads_from_outside_is_kept(model, names):
    """A CUDA graph reads the memory where its constants were: those of the caches must not be given up with the cache."""
    pair = images(1, masks=True)
    tensors, rebuild = pair.taken_apart()
    present = [t for t in tensors if t is not None]

    def run(*given: torch.Tensor) -> torch.Tensor:
        rest = iter(given)
        return deform(
            model, rebuild([None if t is None else next(rest) for t in tensors]), names, steps=5, min_voxels=1
        )

    cached: dict = {}
    with torch.no_grad():
        with fields.keeping_cached(cached):
            run(*present)
        with fields.keeping_cached(cached, complete=True):
            recorded = make_fx(run)(*present)
    kept = {
        t.untyped_storage().data_ptr() for t in (*cached.values(), *model.regnet.parameters(), *model.regnet.buffers())
    }
    read = {node.target for node in recorded.graph.nodes if node.op == "get_attr"}
    assert len(read) > 5
    assert [n for n in read if getattr(recorded, n).untyped_storage().data_ptr() not in kept] == []


def test_while_a_pass_is_recorded_nothing_is_cached():
    """The tensor would be made when the recording is played, and be used before."""
    with ThreadPoolExecutor(1) as other, fields.keeping_cached({}, complete=True):
        assert other.submit(fields.constants, 1.0, like=torch.ones(1)).result() == 1  # another thread is not concerned
    with fields.keeping_cached({}, complete=True), pytest.raises(RuntimeError, match="not needed before"):
        fields.constants(3.25, -1.5, 77.0, like=torch.ones(1))
    assert fields.constants(3.25, -1.5, 77.0, like=torch.ones(1)).tolist() == [3.25, -1.5, 77.0]


def test_what_a_recording_needs_may_be_more_than_the_caches_hold():
    """A forward pass of a large grid needs more grids than are kept between registrations."""
    shapes, cached = [(n, 5, 5) for n in range(2, 4 + fields.CACHED_GRIDS)], {}

    def run() -> list[torch.Tensor]:
        return [fields.sample_displaced(torch.ones(1, 1, *shape), torch.zeros(1, 3, *shape)) for shape in shapes]

    with fields.keeping_cached(cached):
        run()
    with fields.keeping_cached(cached, complete=True):
        assert len(run()) == len(shapes) > fields.CACHED_GRIDS


class FakeRecording:
    """Stands in for a CUDA graph: notes what is recorded and played."""

    made = 0

    def __init__(self, function, *tensors) -> None:
        type(self).made += 1
        self.function = function

    def __call__(self, *tensors):
        return -self.function(*tensors)


def test_what_is_called_a_second_time_with_the_same_shapes_is_recorded():
    def on_cuda(*shape: int) -> torch.Tensor:
        return torch.ones(shape).as_subclass(OnCuda)

    FakeRecording.made, recorder = 0, Recorder(FakeRecording)
    results = [float(recorder("a", torch.sum, on_cuda(2))) for _ in range(3)]
    assert results == [2, -2, -2] and FakeRecording.made == 1
    assert float(recorder("b", torch.sum, on_cuda(2))) == 2  # other settings
    assert float(recorder("b", torch.sum, on_cuda(3))) == 3  # another shape
    assert float(recorder("b", torch.sum, on_cuda(3), room=False)) == 3  # no memory to keep it
    assert float(recorder("b", torch.sum, on_cuda(3))) == -3 and FakeRecording.made == 2
    assert float(recorder("a", torch.sum, on_cuda(2))) == -2 and FakeRecording.made == 2  # kept beside the other
    assert [float(recorder("c", torch.sum, torch.ones(2))) for _ in range(3)] == [2, 2, 2]  # on the CPU


def test_a_pass_that_looks_at_its_data_is_not_recorded(model):
    settings = model.card.variational_settings
    pair = images(0)
    assert methods.is_recordable(pair, ("variational",), settings)
    assert not methods.is_recordable(replace(pair, measured=None), ("variational",), settings)
    assert not methods.is_recordable(pair, ("variational",), replace(settings, min_gain=0.1))
    masked = replace(pair, fixed_mask=torch.ones_like(pair.fixed, dtype=torch.bool))
    assert not methods.is_recordable(masked, ("variational",), replace(settings, masks="exclude"))
