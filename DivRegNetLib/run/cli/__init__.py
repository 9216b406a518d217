"""The command line: ``divregnet register | apply | evaluate | report | models``, a module for each command."""

import argparse
import contextlib
import os
import sys
from typing import NoReturn

from DivRegNetLib import __version__
from DivRegNetLib.errors import DivRegNetError, missing_package
from DivRegNetLib.run.cli import apply, evaluate, models, register, report
from DivRegNetLib.run.process import leave, prepare_process
from DivRegNetLib.run.threads import prepare_threads

BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 1, 130
COMMANDS = {"register": register, "apply": apply, "evaluate": evaluate, "report": report, "models": models}


def command() -> NoReturn:
    """The program ``divregnet``: :func:`main` with the arguments of the process, which ends with its exit code."""
    leave(main())


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for an error that the user can correct, 1 for an unexpected one."""
    prepare_process()
    prepare_threads()
    args = _parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return _report(args, "interrupted", INTERRUPTED)
    except DivRegNetError as error:
        return _report(args, str(error), BAD_INPUT)
    except ImportError as error:
        return _report(args, missing_package(error), BAD_INPUT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else "the system refused: "
        return _report(args, where + (error.strerror or str(error)), BAD_INPUT)
    except Exception as error:
        return _report(args, f"unexpected {type(error).__name__}: {error} (--debug shows where)", UNEXPECTED)


def _report(args: argparse.Namespace, message: str, code: int) -> int:
    """Prints an error in one line; with ``--debug`` raises it again."""
    if args.debug:
        raise
    with contextlib.suppress(OSError):
        print(f"divregnet: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="divregnet", description="Deformable registration of medical images.")
    parser.add_argument("--version", action="version", version=f"divregnet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.DESCRIPTION, description=module.DESCRIPTION)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_argument("--json", action="store_true", help="print results as JSON")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
