"""The errors of the library, with messages for the user, and sentences made of other libraries' errors."""

import re


class DivRegNetError(Exception):
    """Base of all errors that a user can act on; the message names the input and the remedy."""


class InputError(DivRegNetError, ValueError):
    """An image, mask, transform, label map, landmark file or option that cannot be used as it is."""


class ModelError(DivRegNetError, ValueError):
    """A model card or weight file that is missing, damaged or of another version."""


class DeviceError(DivRegNetError, RuntimeError):
    """The device asked for is not there, or its memory is too small."""


class Cancelled(DivRegNetError):
    """The progress callback asked to stop."""


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, torch's of either device, oneDNN's (whose convolutions then cannot be set up), and ITK's."""
    phrases = ("allocate memory", "not enough memory", "out of memory", "bad allocation", "bad_alloc", "alloc_failed",
               "could not create a primitive", "could not execute a primitive")  # fmt: skip
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in phrases)
    )


def reason_of(error: Exception) -> str:
    """What the system says, or the last informative line of an ITK error, without its source locations."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("orthonormal" in line for line in lines):
        return "its axes are not at right angles, which this format cannot store; resample it, or save it as NRRD"
    noise = ("Exception thrown", "sitk::ERROR: itk::", "Reason: No such file")
    informative = [line for line in lines if not line.startswith(noise)] or lines or [type(error).__name__]
    return re.sub(r"^(sitk::ERROR:|ITK ERROR:|\w+\(0x\w+\):|\s)*", "", informative[-1])[:200]


def missing_package(error: ImportError) -> str:
    """A sentence on a package that is not there or cannot be loaded."""
    name = (error.name or "it").split(".")[0]
    return f"a Python package is missing or damaged: {error}; install {name}, for instance with: pip install {name}"
