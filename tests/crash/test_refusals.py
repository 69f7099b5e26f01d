"""What must not be mixed is refused: two writers, other rows, another base; and what is not a number is never saved."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import small
import torch
from lab import Bench
from safetensors.torch import load_file

from metier.core import DivergedError
from metier.training import checkpoint, loop

JOB = "decoder-lora-packed"


def stopped(lab, name: str = JOB) -> Bench:
    """A run that was killed after a few checkpoints."""
    bench = lab.bench(name)
    running = bench.start()
    assert running.says('"event": "step", "step": 5')
    running.send(signal.SIGKILL)
    assert running.end().code == -signal.SIGKILL
    return bench


class TestTwoWriters:
    def test_the_second_is_refused_and_the_first_ends_well(self, lab, counts):
        counts["writers"] += 1
        bench = lab.bench(JOB)
        first = bench.start()
        assert first.says('"event": "validation"')
        first.send(signal.SIGSTOP)
        second = bench.run()
        first.send(signal.SIGCONT)
        assert second.code == 73, second.said[-2000:]
        assert f"process {first.pid} on " in second.said
        bench.check(first.end())
        counts["writers: held"] += 1

    def test_of_many_at_once_on_a_killed_run_one_goes_on(self, lab, counts):
        counts["writers"] += 1
        bench = stopped(lab)
        running = [bench.start() for _ in range(4)]
        ended = [one.end() for one in running]
        codes = sorted(one.code for one in ended)
        # Whoever comes when all is done is told so.
        strange = [one.said[-2000:] for one in ended if one.code not in {0, 73}]
        assert not strange, strange[0]
        assert codes[0] == 0
        bench.check(next(one for one in ended if one.code == 0))
        counts["writers: held"] += 1


class TestOthers:
    @pytest.mark.parametrize("changed", ["rows", "base"])
    def test_other_rows_and_another_base_are_refused(self, lab, counts, changed):
        counts["others"] += 1
        bench = stopped(lab)
        before = {path: path.read_bytes() for path in (bench.folder / "checkpoints").rglob("*") if path.is_file()}
        file = lab.root / "chat.jsonl" if changed == "rows" else lab.root / "llama" / "model.safetensors"
        kept = file.read_bytes()
        try:
            _change(file)
            done = bench.run()
        finally:
            file.write_bytes(kept)
        assert done.code == 2, done.said[-2000:]
        assert f"the run was begun with something else: the {changed}: " in done.said
        assert " -> " in done.said
        assert {path: path.read_bytes() for path in before} == before
        bench.check(bench.run())
        counts["others: held"] += 1


def _change(file: Path) -> None:
    if file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        row = json.loads(lines[3])
        lines[3] = json.dumps({**row, "completion": "something else"})
        file.write_text("\n".join(lines) + "\n")
        return
    from safetensors.torch import save_file

    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


class TestDivergence:
    @pytest.mark.parametrize("step", range(1, small.STEPS + 1))
    def test_what_is_not_a_number_stops_the_run_and_is_not_saved(self, tmp_path, counts, monkeypatch, step):
        """A weight is spoilt before step k: checkpoints up to k - 1 stay, and no number in them is not one."""
        counts["diverged"] += 1
        wanted, _ = small.train(tmp_path / "whole")
        take, calls = loop.train_step, []

        def spoilt(module, *words, **more):
            calls.append(1)
            if len(calls) == step:
                with torch.no_grad():
                    module.outer.weight[0, 0] = math.nan
            return take(module, *words, **more)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", spoilt)
            with pytest.raises(DivergedError) as caught:
                small.train(tmp_path / "run", keep=9)
        assert caught.value.exit_code == 70
        points = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
        assert [int(path.name[5:13]) for path in points] == list(range(1, step))
        assert all(checkpoint.find_damage(path) is None for path in points)
        for path in (tmp_path / "run").rglob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())
        again, _ = small.train(tmp_path / "run", keep=9)
        assert small.bits(again) == small.bits(wanted)
        counts["diverged: held"] += 1


@pytest.mark.parametrize("name", [JOB, "encoder-full-packed", "cells-full-map", "seq2seq-lora-map"])
def test_the_same_recipe_gives_the_same_bits(lab, counts, whole, name):
    if not whole and name != JOB:
        pytest.skip("in make crash")
    for _ in range(10 if whole else 2):
        counts["same"] += 1
        bench = lab.bench(name)
        bench.check(bench.run())
        counts["same: held"] += 1
