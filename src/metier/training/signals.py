"""Ctrl-C and SIGTERM while a network trains: the step is finished, then the run is saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metier.core.log import note


class Struck(BaseException):
    """A signal arrived while nothing was done that is lost by breaking off."""


class Signals:
    """Which signals arrived."""

    def __init__(self) -> None:
        """None yet."""
        self._arrived = False
        self._breakable = False

    def __call__(self) -> bool:
        """Whether one arrived."""
        return self._arrived

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Break the block off when a signal arrives, or has arrived.

        Raises:
            Struck: Then.
        """
        self._breakable = True
        try:
            if self._arrived:
                raise Struck
            yield
        finally:
            self._breakable = False

    def remember(self, number: int, _: Any) -> None:
        """What the system calls.

        Raises:
            KeyboardInterrupt: The second time.
        """
        if self._arrived:
            raise KeyboardInterrupt
        self._arrived = True
        note(f"{signal.Signals(number).name}: finishing this step, then saving; once more to stop at once")
        if self._breakable:
            raise Struck


@contextmanager
def signals() -> Iterator[Signals]:
    """Gather SIGINT and SIGTERM while the block runs; a second one ends it at once."""
    found = Signals()
    try:
        before = {number: signal.signal(number, found.remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever embeds us owns the signals
        yield found
        return
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
