"""The table of the crash suite."""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path

import torch

ROWS = (
    ("kills", "killed with SIGKILL, then the same command: resumed unaided, never behind an acknowledged checkpoint", "48 of 74"),
    ("ends", "runs that were killed (up to four times each): weights, log and sample ids identical to the uninterrupted run", "43 of 74"),
    ("damaged", "newest checkpoint damaged (flip, truncate, zero, delete, append, swap): noticed, named, the one before taken", "0 of 3"),
    ("faults", "ENOSPC or EIO at the n-th file operation of a training, for every n: exit 74 or done, no debris, then identical", "not tried"),
    ("prefixes", "power cut after every prefix of the recorded file operations: the newest acknowledged checkpoint loads", "not tried"),
    ("full", "disk full (a real tmpfs, RLIMIT_FSIZE): exit 74, no debris, checkpoint intact, then identical", "debris blocks the resume"),
    ("preflight", "too little space for the checkpoints to come: refused before the first step", "not done"),
    ("signals", "SIGTERM or SIGINT at any moment: saved within one step, exit 75, the same command ends identical", "dies unsaved"),
    ("writers", "a second process on the same folder, also of many at once on a killed run: refused with exit 73", "accepted"),
    ("others", "other rows or another base under the same recipe: refused with the difference, exit 2", "accepted"),
    ("diverged", "not a number at step k: exit 70, checkpoints up to k-1 intact and finite", "logs loss 0.0, exit 0"),
    ("same", "the same recipe again: the same bits", "measured the same"),
)  # fmt: skip
"""Count, promise, and what HF Trainer 5.23 and TRL 1.16 did, measured in the same way."""


def write_table(path: Path, counts: Counter[str], seconds: float, *, failed: int) -> None:
    """Write what was tried and what held."""
    lines = [
        "# Crash suite",
        "",
        "```bash",
        "make crash",
        "```",
        "",
        "| what was done, and what must hold | held | HF Trainer 5.23 and TRL 1.16, measured |",
        "|---|---:|---|",
        *(f"| {said} | {counts[f'{name}: held']} of {counts[name]} | {peer} |" for name, said, peer in ROWS),
        "",
        "Kills by where they were aimed:",
        "",
        "| aim | kills |",
        "|---|---:|",
        *(
            f"| {name.removeprefix('aim: ')} | {count} |"
            for name, count in sorted(counts.items())
            if name.startswith("aim: ")
        ),
        "",
        "Kills by job: "
        + ", ".join(
            f"{name.removeprefix('job: ')} {count}"
            for name, count in sorted(counts.items())
            if name.startswith("job: ")
        )
        + ".",
        "",
        f"{failed} tests failed. {seconds / 60:.0f} minutes, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {platform.system()}, one thread; a machine that others used as well. "
        "Jobs are tiny networks with a checkpoint after every step (`tests/crash/cases.py`); "
        "the peers' figures are of a tiny llama, killed and started again in the same way.",
        "",
    ]
    path.write_text("\n".join(lines), "utf-8")
