"""What all tests share: the folder of this file is importable (`import tiny`), and nothing reaches for the network."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def metier(monkeypatch, capfd) -> Iterator[Callable[..., Done]]:
    """`metier` with the words given, in this process: what it imports is imported once for all tests."""
    from metier import cli
    from metier.core.log import set_quiet

    handler = signal.getsignal(signal.SIGTERM)

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["metier", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(int(ended.value.code or 0), *capfd.readouterr())

    yield call
    signal.signal(signal.SIGTERM, handler)
    set_quiet(quiet=False)
