"""A cohort in this process, one pair after another."""

from collections.abc import Iterator
from pathlib import Path

from DivRegNetLib import models
from DivRegNetLib.core.device import pick_device
from DivRegNetLib.options import Options
from DivRegNetLib.run.cohort.pairs import Pair
from DivRegNetLib.run.cohort.register_row import register_row


def rows(pairs: dict[str, Pair], output: Path, options: Options, *, overwrite: bool, preview: bool) -> Iterator[dict]:
    """The rows of a cohort as pairs finish; see :func:`DivRegNetLib.run.cohort.register_pairs`.

    Raises:
        ModelError, DeviceError: the model or the device cannot be used.
    """
    model = models.load(options.model, pick_device(options.device))
    for name, pair in pairs.items():
        yield register_row(name, pair, output, options, lambda: model, overwrite=overwrite, preview=preview)
