"""Variational registration: Gauss-Newton steps on mutual information, without training. docs/method.md has the mathematics.

Only the settings are imported here, which need no torch; the registration is :func:`.method.register`.
"""

from DivRegNetLib.registration.variational.settings import (
    DEFAULT,
    FAST,
    REFINEMENT,
    Level,
    Smoothness,
    VariationalSettings,
)

__all__ = ["DEFAULT", "FAST", "REFINEMENT", "Level", "Smoothness", "VariationalSettings"]
