"""Where results are printed."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 160
"""Columns of a line that no terminal shows."""


def screen() -> Console:
    """Standard output: as wide as the terminal, or wide where it is a pipe or a file, so that no line is cut there."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
