"""Registration of two images: from alignment to displacement fields."""

METHODS = ("discrete", "variational", "regnet")
"""Names of the methods that make a displacement, see :mod:`DivRegNetLib.registration.methods`."""
