"""DivRegNet's registration library; see DivRegNetLib/registration/pipeline.py for how one registration flows.

``from DivRegNetLib import register`` imports torch; importing this package does not.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ("register", "Result"):
        from DivRegNetLib.registration import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
