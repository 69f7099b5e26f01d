"""Killed anywhere, the same command ends with the bits of the run that nobody killed."""

from __future__ import annotations

import random
import signal
from collections import Counter

import cases
import pytest
from lab import Bench, aimed

SEQUENCES = 7
"""Runs of each job that are killed, in the whole suite."""
KILLS = 4
"""Most kills of one run."""
QUICK = (
    "decoder-full-map",
    "decoder-lora-packed",
    "encoder-full-streamed",
    "seq2seq-lora-map",
    "cells-full-map",
    "cells-lora-streamed",
)
AIMS = {
    "a file of a save": "checkpoints/.staged-step-N/",
    "a file of the best weights": "checkpoints/.staged-best-N/",
    "the commit of a save": "checkpoints/.staged-",
    "removing old checkpoints": "checkpoints/.removed-",
    "the log": "metrics.jsonl",
    "the export": ".staged/",
    "the report and the last facts": ".staged-",
    "removing all checkpoints": ".removed-checkpoints",
}
"""Where kills are aimed: the beginning of the path that the file operation is done on."""


def aims(operations: Counter[tuple[str, str]]) -> dict[str, list[tuple[tuple[str, str], int]]]:
    """The file operations of a run, by aim; the first aim that fits counts."""
    found: dict[str, list[tuple[tuple[str, str], int]]] = {name: [] for name in AIMS}
    for (kind, path), count in sorted(operations.items()):
        for name, begin in AIMS.items():
            if path.startswith(begin) and (" -> " in path or kind == "sync_folder" or name != "the commit of a save"):
                found[name].append(((kind, path), count))
                break
            if name == "removing old checkpoints" and " -> checkpoints/.removed-" in path:
                found[name].append(((kind, path), count))
                break
    return {name: some for name, some in found.items() if some}


def kill(bench: Bench, chance: random.Random, counts: Counter[str]) -> bool:
    """Run, and kill once; whether that was early enough."""
    wanted = bench.lab.reference(bench.name)
    if chance.random() < 0.5:
        running = bench.start()
        running.after(chance.random() * wanted.seconds)
        running.send(signal.SIGKILL)
        done, aim = running.end(), "any moment"
    else:
        by_aim = aims(wanted.operations)
        aim = chance.choice(sorted(by_aim))
        operation, count = chance.choice(by_aim[aim])
        done = bench.run(disk=aimed(bench, operation, chance.randint(1, count)))
    if done.code != -signal.SIGKILL:
        assert done.code == 0, done.said[-2000:]
        return False
    counts["kills"] += 1
    counts[f"aim: {aim}"] += 1
    counts[f"job: {bench.name}"] += 1
    return True


@pytest.mark.parametrize("number", range(SEQUENCES))
@pytest.mark.parametrize("name", cases.NAMES)
def test_a_killed_run_ends_as_the_one_that_nobody_killed(lab, counts, whole, name, number):
    if not whole and (number or name not in QUICK):
        pytest.skip("in make crash")
    chance = random.Random(f"{name} {number}")
    bench = lab.bench(name)
    pending = 0
    for _ in range(KILLS if whole else 2):
        saved = bench.acknowledged()
        pending += kill(bench, chance, counts)
        held_on(bench, saved)
    saved = bench.acknowledged()
    done = bench.run()
    assert done.code == 0, done.said[-2000:]
    if "this run is finished" not in done.said:
        assert (done.resumed or 0) >= saved
    counts["kills: held"] += pending
    counts["ends"] += 1
    bench.check(done)
    counts["ends: held"] += 1


def held_on(bench: Bench, saved: int) -> None:
    """What was acknowledged before this process began is there still, or something newer, unless all is done."""
    if saved and not (bench.folder / "metier.json").exists():
        assert max(bench.usable(), default=0) >= saved
