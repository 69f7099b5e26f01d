"""The crash suite: a quick selection in `make test`, and all of it in `make crash`, which also writes the table."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A process with threads cannot be forked safely, and more than one would change the bits.
os.environ["OMP_NUM_THREADS"] = "1"

from lab import Lab
from table import write_table

WHOLE = os.environ.get("METIER_CRASH") == "whole"
TABLE = Path(__file__).parents[2] / "bench" / "results" / "crash.md"
COUNTS: Counter[str] = Counter()
BEGAN = time.monotonic()


@pytest.fixture(scope="package")
def whole() -> bool:
    """Whether everything is tried, and not a selection."""
    return WHOLE


@pytest.fixture(scope="package")
def counts() -> Counter[str]:
    """What was tried and how often it held: `name` and `name: held`."""
    return COUNTS


@pytest.fixture(scope="package")
def lab(tmp_path_factory):
    """Models, rows and runs."""
    root = tmp_path_factory.mktemp("crash")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIER_CACHE", str(root / "cache"))
        yield Lab(root)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the table, once everything was tried."""
    if WHOLE and COUNTS:
        failed = sum(len(terminalreporter.stats.get(how, ())) for how in ("failed", "error"))
        write_table(TABLE, COUNTS, time.monotonic() - BEGAN, failed=failed)
