"""Models on disk: cards that say what a model is for, and the store that finds, loads and saves them."""

from DivRegNetLib.models.card import Card, read_card
from DivRegNetLib.models.store import (
    DEFAULT,
    ENVIRONMENT,
    Cache,
    Model,
    bundled_folder,
    card_files,
    checksum,
    find,
    folders,
    load,
    own_folder,
    own_folders,
    save,
)

__all__ = [
    "DEFAULT",
    "ENVIRONMENT",
    "Cache",
    "Card",
    "Model",
    "bundled_folder",
    "card_files",
    "checksum",
    "find",
    "folders",
    "load",
    "own_folder",
    "own_folders",
    "read_card",
    "save",
]
