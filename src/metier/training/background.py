"""One piece of work at a time beside the training thread: what writes and syncs does not hold up the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable

PATIENCE_SECONDS = 1.0
"""How long work that was told to stop is waited for."""


class Background:
    """Does work on a thread of its own, in the order given; its errors come up in the thread that gave it."""

    def __init__(self) -> None:
        """Begin idle."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopped = threading.Event()

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work once the one before it has ended.

        Raises:
            Exception: What the work before it ended with.
        """
        self.wait()
        # A daemon: whoever ends the process at once shall not wait for a disk.
        self._thread = threading.Thread(target=self._do, args=(work,), name="metier-save", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Go on.

        Raises:
            Exception: What a piece of work that has ended since ended with.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is left to do.

        Raises:
            Exception: What the work ended with.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def stopped(self) -> bool:
        """Whether work shall end where it stands."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Have the work end where it stands, and wait a moment for it; nothing can be started afterwards."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that gave the work
            self._error = error
