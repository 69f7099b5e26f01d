"""How messages name many things."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(items: Sequence[object], most: int = 5) -> str:
    """The first few of a list, and how many follow: "a, b and 3 more"."""
    named = ", ".join(map(str, items[:most]))
    return f"{named} and {len(items) - most:,} more" if len(items) > most else named
