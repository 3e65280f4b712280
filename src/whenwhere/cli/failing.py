"""Failing well: one clear line on stderr and exit code 2, whatever a user got wrong."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import typer

ENVIRONMENT_VARIABLE = "WHENWHERE_TRACEBACK"

P = ParamSpec("P")


def clearly(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors and warnings are lines on stderr; errors end it with exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with warnings.catch_warnings():
                # Libraries tell their developers of things to come; users asked for something else.
                for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                    warnings.simplefilter("ignore", category)
                warnings.showwarning = _show_warning
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            if os.environ.get(ENVIRONMENT_VARIABLE):
                raise
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(2) from None

    return run


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)
