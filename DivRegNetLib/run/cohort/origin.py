"""What results were made from: contents of the input files, options, model and version. Results of anything else are not
reused."""

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from DivRegNetLib import __version__, models
from DivRegNetLib.errors import InputError
from DivRegNetLib.io.volume_files import files_of
from DivRegNetLib.models import Card
from DivRegNetLib.options import Options
from DivRegNetLib.run.cohort.pairs import Pair

WITHOUT_EFFECT = ("device", "model")  # options that do not change the result, or are told by the card


def origin_of(pair: Pair, options: Options, card: Card | None = None) -> dict:
    """The origin of the results of a pair, for its report.

    Args:
        card: of the model; None: of the one that the options name.
    Raises:
        InputError: an input cannot be read. ModelError: the model cannot be used.
    """
    card = card or models.read_card(models.find(options.model))
    content = json.dumps(asdict(card), sort_keys=True, default=str)
    return {
        "inputs": {name: digest(path) for name, path in pair.paths().items()},
        "options": {k: v for k, v in options.as_dict().items() if k not in WITHOUT_EFFECT},
        "model": hashlib.sha256(content.encode()).hexdigest(),
        "version": __version__,
    }


def differences(made: dict | None, wanted: dict) -> list[str]:
    """In words what differs between two origins; nothing where they are the same."""
    made, wanted = (json.loads(json.dumps(origin)) for origin in (made, wanted))  # tuples and lists are the same
    if not isinstance(made, dict) or any(type(made.get(key)) is not type(wanted[key]) for key in wanted):
        return ["they do not say what they were made from"]
    found = [
        f"{name.replace('_', ' ')} differs" for name in {**made["inputs"], **wanted["inputs"]}
        if made["inputs"].get(name) != wanted["inputs"].get(name)
    ]  # fmt: skip
    for name in {**made["options"], **wanted["options"]}:
        before, now = made["options"].get(name), wanted["options"].get(name)
        if before != now:
            short = isinstance(before, list) or isinstance(now, list)
            found.append(f"{name} differs" if short else f"{name} was {before} and is {now}")
    found += ["the model differs"] if made["model"] != wanted["model"] else []
    if made["version"] != wanted["version"]:
        found.append(f"DivRegNet was version {made['version']} and is {wanted['version']}")
    return found


def digest(path: Path) -> str:
    """SHA-256 of what is at a path: of a file, or of the names and contents of the files in a folder or of a header and the
    files of voxels that it names. Raises InputError where one cannot be read."""
    try:
        files = files_of(path)
        if files == [path]:
            return _digest_of(path)
        whole = hashlib.sha256()
        for file in files:
            whole.update(f"{file.name}\0{_digest_of(file)}\0".encode("utf-8", "surrogateescape"))
        return whole.hexdigest()
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def _digest_of(path: Path) -> str:
    status = path.stat()
    return _digest(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)  # a cohort has images that are in many pairs
def _digest(path: Path, *state: int) -> str:
    return models.checksum(path)
