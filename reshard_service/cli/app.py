"""Puts the commands together and turns every error into an exit code and a message (decision 22)."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Annotated

import typer

from reshard_service import __version__
from reshard_service.cli.commands_convert import convert_command, plan_command
from reshard_service.cli.commands_layout import layout_app
from reshard_service.cli.commands_look import diff_command, doctor_command, inspect_command, verify_command
from reshard_service.cli.output import error_document, print_error, print_json, say
from reshard_service.errors import Cancelled, EnvironmentUnfit, ReshardError, UsageError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

app = typer.Typer(
    name="reshard",
    help="Convert and reshard checkpoints exactly: streaming, without the training code, in constant memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("inspect")(inspect_command)
app.command("plan")(plan_command)
app.command("convert")(convert_command)
app.command("diff")(diff_command)
app.command("verify")(verify_command)
app.command("doctor")(doctor_command)
app.add_typer(layout_app, name="layout")


@app.callback(invoke_without_command=True)
def _general(
    version: Annotated[bool, typer.Option("--version", help="tell the version and leave")] = False,
) -> int:
    if version:
        say(f"reshard {__version__}")
        raise typer.Exit
    return 0


class _Stopped(BaseException):
    """A signal. Not a KeyboardInterrupt: typer makes that an exit code of its own, and says nothing."""


def _stop(number: int, frame: object) -> None:
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_DFL)  # whoever asks again doesn't want to wait
    raise _Stopped


def main() -> None:
    """Entry point of the console script."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _stop)
    wants_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()  # here, where a reader that went away is no error
    except ReshardError as error:
        print_error(error, wants_json)
        sys.exit(error.exit_code)
    except (_Stopped, KeyboardInterrupt, typer.Abort):
        print_error(Cancelled("stopped; nothing became visible at the target"), wants_json)
        sys.exit(Cancelled.exit_code)
    except SystemExit:
        sys.exit(_reader_gone())  # what typer makes of a broken pipe, whose exit code would mean something else
    except Exception as error:
        sys.exit(_unexpected(error, wants_json))
    sys.exit(code if isinstance(code, int) else 0)


def _reader_gone() -> int:
    """Whoever read our output has seen enough; what is still in the buffer goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    return 0


def _unexpected(error: Exception, wants_json: bool) -> int:
    """Usage errors of the option parser keep their own words; anything else is a fault of ours."""
    show = getattr(error, "show", None)
    if callable(show):
        show(file=sys.stderr)
        if wants_json:
            print_json({"error": error_document(UsageError(getattr(error, "message", "") or str(error)))})
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, BrokenPipeError):
        return _reader_gone()
    if isinstance(error, FileNotFoundError) and not _has_working_folder():
        gone = EnvironmentUnfit("the working folder was deleted", hint="change to one that exists")
        print_error(gone, wants_json)
        return gone.exit_code
    if os.environ.get("RESHARD_DEBUG"):
        raise error
    fault = ReshardError(
        f"unexpected {type(error).__name__}: {error}",
        hint="this is a fault of the tool; RESHARD_DEBUG=1 shows where, please report it",
    )
    print_error(fault, wants_json)
    return fault.exit_code


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
