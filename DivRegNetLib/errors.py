"""What can go wrong, in words meant for the person who asked."""


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
