"""The one error that bad input raises, and how the command line shows it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class InputError(ValueError):
    """Input that cannot be used: the message names the file, what was expected and what was found."""


def find_input_error(error: BaseException | None) -> InputError | None:
    """Return the :class:`InputError` behind an exception, if there is one: MONAI wraps what transforms raise."""
    looked_at: set[int] = set()  # an exception may be its own cause, by way of others
    while error is not None and id(error) not in looked_at:
        if isinstance(error, InputError):
            return error
        looked_at.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def bare_input_errors() -> Iterator[None]:
    """Raise the :class:`InputError` behind an exception in its place; any other exception stays as it is."""
    try:
        yield
    except Exception as error:
        found = find_input_error(error)
        if found is None or found is error:
            raise
        raise found from error


def report_input_errors() -> None:
    """Make an uncaught :class:`InputError` end the program with its one sentence instead of a traceback.

    The exit status stays 1. Every other exception keeps its traceback: that one is a defect, not bad input.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        found = find_input_error(error)
        if found is not None:
            print(f"error: {found}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = hook
