"""Model cards: purpose, settings and origin of a model, as JSON beside its weights. Read without torch."""

import json
import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from DivRegNetLib.errors import ModelError
from DivRegNetLib.registration import METHODS
from DivRegNetLib.registration.variational.settings import DEFAULT, REFINEMENT, VariationalSettings

if TYPE_CHECKING:
    from DivRegNetLib.core.grid import Grid

FORMAT = 3
LARGEST_CARD_BYTES = 1_000_000
WORKING_VOXELS = 1_200_000  # of a grid that follows the field of view: 2 mm for a head
FINEST_MM = 0.1


@dataclass(frozen=True)
class Card:
    """Purpose, settings and origin of a model.

    name: also the name of the weight file, ``name.safetensors``.
    version: of the model.
    summary: one line for a list.
    modalities: of the images it was trained on.
    anatomy: what the images show.
    skull: ``whole``, ``stripped``, ``either`` or ``not applicable``.
    spacing_mm: of the isotropic grid it works on, along the LPS axes; 0: see :meth:`working_spacing`.
    normalization: a key of :data:`DivRegNetLib.core.intensity.SCHEMES`.
    methods: names of :data:`DivRegNetLib.registration.METHODS`, in the order in which they run.
    variational: fields of :class:`DivRegNetLib.registration.variational.VariationalSettings` of that method.
    refinement: the same, of the steps that the option ``refine`` asks for.
    regnet: fields of :class:`DivRegNetLib.registration.regnet.RegNetConfig`; None if the file has no such network.
    kldivnet: fields of :class:`DivRegNetLib.similarity.kldivnet.KLDivNetConfig`; None if the file has no similarity network.
    classnet: fields of :class:`DivRegNetLib.similarity.classes.ClassNetConfig`; None if the file has no class network.
    classes: names of the classes that it tells apart, background first.
    classes_up_to_ml: volume of the working grid, in ml, up to which the class network takes part, where it has learned crops of
        a part of the body; 0: any volume.
    training: data, its license, command, configuration.
    scores: results by task.
    license: of the weights.
    sha256: of the weight file.
    good_for, limits: sentences for the user: the images that it registers well, and those that it does not.
    format: version of this card format.
    """

    name: str
    version: str
    summary: str
    modalities: list
    anatomy: str
    skull: str
    spacing_mm: float
    normalization: str
    methods: list
    variational: dict
    refinement: dict
    regnet: dict | None
    kldivnet: dict | None
    training: dict
    scores: dict
    license: str
    sha256: str
    classnet: dict | None = None
    classes: list = field(default_factory=list)
    classes_up_to_ml: float = 0.0
    good_for: str = ""
    limits: str = ""
    format: int = FORMAT

    @property
    def variational_settings(self) -> VariationalSettings:
        return VariationalSettings.from_dict(self.variational)

    @property
    def refinement_settings(self) -> VariationalSettings:
        return VariationalSettings.from_dict(self.refinement)

    def classes_cover(self, grid: "Grid") -> bool:
        """Whether the class network takes part on a working grid."""
        ml = grid.voxels * math.prod(grid.spacing) / 1000
        return not self.classes_up_to_ml or ml <= self.classes_up_to_ml

    def working_spacing(self, fixed: "Grid", moving: "Grid", voxels: float = WORKING_VOXELS) -> float:
        """Spacing in mm of the grid on which a pair is registered.

        Where ``spacing_mm`` is 0 it follows the field of view: about so many voxels cover the fixed image, but they
        are no smaller than the shortest side of a voxel of either image.

        Args:
            fixed, moving: grids of the images; only their ``size`` and ``spacing`` are used.
        """
        if self.spacing_mm:
            return self.spacing_mm
        volume = math.prod(n * mm for n, mm in zip(fixed.size, fixed.spacing, strict=True))
        return round(max((volume / voxels) ** (1 / 3), min(*fixed.spacing, *moving.spacing), FINEST_MM), 2)


def read_card(file: Path) -> Card:
    """Reads and checks a card.

    Raises:
        ModelError: names the file and what is wrong: unreadable, a missing or unknown key, a wrong type, a value out of
            range, an unknown format version.
    """
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited on
            raise ModelError(f"{file}: the model card is not a regular file")
        if file.stat().st_size > LARGEST_CARD_BYTES:
            raise ModelError(f"{file}: a model card of more than {LARGEST_CARD_BYTES} bytes is refused")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: the model card cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: a model card is a JSON object")
    values = _upgraded(values)
    if values.get("format") != FORMAT:
        raise ModelError(
            f"{file}: the card has format {values.get('format')!r}, this version of DivRegNet reads {FORMAT}; "
            "update DivRegNet or export the model again"
        )
    known = {f.name: f.type for f in fields(Card)}
    for key in fields(Card):
        if key.default is MISSING and key.default_factory is MISSING and key.name not in values:
            raise ModelError(f"{file}: the model card has no {key.name!r}")
    if unknown := sorted(set(values) - set(known)):
        raise ModelError(f"{file}: the model card has an unknown key {unknown[0]!r}")
    values |= {k: float(values[k]) for k in ("spacing_mm", "classes_up_to_ml") if type(values.get(k)) is int}
    for key, value in values.items():
        if not isinstance(value, known[key]):
            raise ModelError(f"{file}: {key!r} in the model card must be {known[key]}, got {value!r:.80}")
    if values["name"] != file.stem:
        raise ModelError(f"{file}: the card is of model {values['name']!r:.80}, its file must have that name")
    if values["spacing_mm"] != 0 and not 0.05 <= values["spacing_mm"] <= 50:
        raise ModelError(f"{file}: spacing_mm must be between 0.05 and 50, or 0, got {values['spacing_mm']}")
    if not 0 <= (ml := values.get("classes_up_to_ml", 0.0)) < math.inf:
        raise ModelError(f"{file}: classes_up_to_ml is 0 or a volume in ml, got {ml}")
    for key in ("variational", "refinement"):
        try:
            VariationalSettings.from_dict(values[key])
        except ValueError as error:
            raise ModelError(f"{file}: {key} in the model card: {error}") from error
    if not values["methods"] or any(name not in METHODS for name in values["methods"]):
        raise ModelError(f"{file}: 'methods' in the model card: one or more of {', '.join(METHODS)}")
    if "regnet" in values["methods"] and values["regnet"] is None:
        raise ModelError(f"{file}: 'methods' in the model card names regnet, but the file has no such network")
    if len(values.get("classes", [])) != (values.get("classnet") or {"classes": 0}).get("classes"):
        raise ModelError(f"{file}: 'classes' in the model card: one name for each class that 'classnet' tells apart")
    return Card(**values)


def _upgraded(values: dict) -> dict:
    """A card of format 1 or 2 converted to format 3; any other card unchanged."""
    if values.get("format") == 2:
        settings = {k: _with_all_voxels(values[k]) for k in ("variational", "refinement") if k in values}
        return values | settings | {"format": 3}
    if values.get("format") != 1 or not isinstance(values.get("regnet"), dict):
        return values
    values = {{"normalisation": "normalization", "licence": "license"}.get(k, k): v for k, v in values.items()}
    regnet = dict(values["regnet"])
    steps = regnet.pop("newton", 0)
    stride = regnet.get("stride", DEFAULT.stride)
    return values | {
        "format": 3,
        "methods": ["regnet"] if steps == 0 else ["variational", "regnet"],
        "variational": DEFAULT.as_dict() | {"stride": stride} | ({} if steps == 0 else {"steps": steps}),
        "refinement": REFINEMENT.as_dict(),
        "regnet": regnet | {"guided": steps != 0},
    }


def _with_all_voxels(settings: object) -> object:
    """Settings of format 2, in which a level whose displacement had the stride 1 was the one that sampled all voxels."""
    levels = settings.get("levels") if isinstance(settings, dict) else None
    if not isinstance(levels, list) or not all(isinstance(level, dict) for level in levels):
        return settings
    whole = settings.get("stride", DEFAULT.stride) == 1  # the grid of all levels
    upgraded = [level | {"all_voxels": level.get("stride") == 1 and not whole} for level in levels]
    return settings | {"levels": [{k: v for k, v in level.items() if k != "stride"} for level in upgraded]}
