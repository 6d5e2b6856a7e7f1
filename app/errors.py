"""Failures that people meet in the normal course of things: one clear line, no traceback."""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot do its work; the message is one line, to be shown as it is.

    `exit_code`: 1 when a server or the data failed, 2 when the command was given something wrong.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
