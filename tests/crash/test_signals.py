"""Stopped by a signal, a run is saved within one step, and the same command goes on to the same bits."""

from __future__ import annotations

import random
import re
import signal

import pytest

JOBS = ("decoder-full-map", "decoder-lora-packed", "encoder-full-packed", "cells-full-map")
RARE = {"export": {"checkpoint_minutes": 60.0}}
"""No checkpoint but the one that the signal asks for."""


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("name", JOBS)
def test_a_signal_saves_within_one_step(lab, counts, whole, name, number):
    if not whole and (number or name in JOBS[2:]):
        pytest.skip("in make crash")
    chance = random.Random(f"{name} {number}")
    counts["signals"] += 1
    bench = lab.bench(name, **RARE)
    running = bench.start()
    assert running.says(f'"event": "step", "step": {chance.randint(1, 6)}')
    running.send(chance.choice([signal.SIGTERM, signal.SIGINT]))
    taken = max(bench.rows())
    done = running.end()
    if done.code != 0:  # it came too late where the run had ended
        assert done.code == 75, done.said[-2000:]
        saved = int(re.search(r"stopped after step (\d+) of|saved is step (\d+) of", done.said)[1] or 8)
        assert taken - 1 <= saved <= taken + 1
        assert bench.usable()[-1:] == [saved]
        assert "the same command goes on from" in done.said
        done = bench.run()
        assert done.resumed == saved
    bench.check(done)
    counts["signals: held"] += 1


def test_outside_of_the_training_it_is_told_what_is_saved(lab, whole):
    bench = lab.bench("decoder-lora-packed", **RARE)
    running = bench.start()
    assert running.says('"event": "validation", "step": 8')
    running.send(signal.SIGTERM)
    done = running.end()
    if done.code:
        assert done.code == 75
        assert re.search(
            r"(stopped at once; saved is step 8 of 8|stopped after step 8 of 8|no step is saved yet)", done.said
        )
        done = bench.run()
    bench.check(done)
