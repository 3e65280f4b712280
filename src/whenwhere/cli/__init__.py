"""The command line: one file per command. Heavy libraries are imported when a command runs, not before."""

from .app import app, main

__all__ = ["app", "main"]
