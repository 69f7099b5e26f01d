"""The command `metier`, and `python -m metier`."""

from __future__ import annotations

from metier.core import heap


def begin() -> None:
    """Run the command line in a process whose heap keeps few holes where tensors were."""
    heap.begin_dense()
    from metier.cli import main

    main()


if __name__ == "__main__":
    begin()
