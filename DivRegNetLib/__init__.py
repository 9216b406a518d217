"""DivRegNet's registration library; DivRegNetLib/registration/pipeline.py shows how one registration flows.

Importing the package does not import torch; ``from DivRegNetLib import register`` does.
"""

__version__ = "0.2.0"
__all__ = ["Options", "Result", "register"]


def __getattr__(name: str):
    if name == "register":
        from DivRegNetLib.core.working_folder import existing_working_folder

        with existing_working_folder():
            from DivRegNetLib.registration.pipeline import register

        return register
    if name == "Options":
        from DivRegNetLib.options import Options

        return Options
    if name == "Result":
        from DivRegNetLib.result import Result

        return Result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
