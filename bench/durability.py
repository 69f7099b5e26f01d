"""What checkpoints cost: the share of a training's wall time, on the demo's model with both methods.

python bench/durability.py > bench/results/durability.md
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS = ("lora", "full")
CALLS = ("save_if_due", "save", "save_best", "save_end", "load_best", "close")
MINUTES = 10.0
"""The default interval."""


def main() -> None:
    """Train by each method in a process of its own, and print the table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--method", choices=METHODS)
    words.add_argument("--steps", type=int, help="steps of the run; the demo's own number without")
    said = words.parse_args()
    if said.method:
        print(json.dumps(measured(said.method, said.steps)))
        return
    found = {}
    for method in METHODS:
        command = [sys.executable, __file__, "--method", method, *(["--steps", str(said.steps)] if said.steps else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found[method] = json.loads(done.stdout.splitlines()[-1])
    print(table(found, said.steps))


def measured(method: str, steps: int | None) -> dict[str, Any]:
    """Run the demo's recipe, with few rows judged afterwards, and add up what saving took."""
    import torch

    from metier import demo
    from metier.core.evidence import Evidence
    from metier.recipe import parse
    from metier.run import run

    ledger = Ledger()
    ledger.watch()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        tree = demo.recipe(method, Path(folder))
        tree["evaluate"] = {"rows": 4, "max_new_tokens": 4, "retention": "off", "baselines": False}
        if steps:
            tree["train"] = {**tree["train"], "max_steps": steps}
        done = run(parse(tree))
        evidence = Evidence.model_validate_json((done.path / "evidence.json").read_text("utf-8"))
    (train,) = [phase for phase in evidence.cost.phases if phase.name == "train"]
    extra = ledger.one["held"] + ledger.one["wall"]
    return {
        "steps": evidence.cost.steps,
        "seconds": train.wall_seconds - extra,
        "held": ledger.held - extra,
        "beside": ledger.beside,
        "one": ledger.one,
        "sizes": ledger.sizes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


class Ledger:
    """What saving takes.

    Attributes:
        held: Seconds for which the training stood still.
        beside: Seconds of work beside it, by the clock and of CPU time.
        one: The same of one checkpoint, written at the end.
        sizes: Bytes of a checkpoint, and of the weights in it.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.held, self._depth = 0.0, 0
        self.beside: dict[str, float] = {"wall": 0.0, "cpu": 0.0}
        self.one: dict[str, float] = {}
        self.sizes: dict[str, int] = {}

    def watch(self) -> None:
        """Put a clock on everything that saves."""
        from metier.training.background import Background
        from metier.training.saver import Saver

        for name in CALLS:
            self._time(Saver, name)
        work, restore, end = Background._do, Saver.restore, Saver.save_end  # noqa: SLF001 - what is measured

        def timed(background: Background, given: Any) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            work(background, given)
            self.beside["wall"] += time.perf_counter() - wall
            self.beside["cpu"] += time.thread_time() - cpu

        def sized(saver: Saver) -> Any:
            from metier.training import checkpoint

            module = saver._module  # noqa: SLF001
            self.sizes = {
                "weights": checkpoint.weights_bytes(module),
                "checkpoint": checkpoint.estimated_bytes(module),
            }
            return restore(saver)

        def with_one_more(saver: Saver, progress: Any) -> None:
            self._write_one(saver, progress)
            end(saver, progress)

        Background._do, Saver.restore, Saver.save_end = timed, sized, with_one_more  # type: ignore[method-assign]  # noqa: SLF001

    def _write_one(self, saver: Any, progress: Any) -> None:
        """A checkpoint as the interval asks for it, for the demo is shorter than the interval."""
        from dataclasses import replace

        saver.close()
        before = dict(self.beside)
        began = time.perf_counter()
        saver._begin(replace(progress, finished=False))  # noqa: SLF001
        held = time.perf_counter() - began
        saver.close()
        self.one = {"held": held, **{name: self.beside[name] - before[name] for name in before}}
        self.beside = before

    def _time(self, owner: type, name: str) -> None:
        given = getattr(owner, name)

        def timed(*words: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return given(*words)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.held += time.perf_counter() - began

        setattr(owner, name, timed)


def table(found: dict[str, dict[str, Any]], steps: int | None) -> str:
    """The figures as Markdown."""
    first = found["lora"]
    command = "python bench/durability.py" + (f" --steps {steps}" if steps else "")
    interval = MINUTES * 60
    lines = [
        "# What checkpoints cost",
        "",
        "```bash",
        f"{command} > bench/results/durability.md",
        "```",
        "",
        "| | LoRA | full |",
        "|---|---:|---:|",
        _row("training, seconds", found, lambda one: f"{one['seconds']:.0f}"),
        _row("steps", found, lambda one: str(one["steps"])),
        _row("held up by saving, seconds", found, lambda one: f"{one['held']:.2f}"),
        _row("share of the training", found, lambda one: f"{one['held'] / one['seconds']:.2%}"),
        _row("CPU time beside the training, seconds", found, lambda one: f"{one['beside']['cpu']:.2f}"),
        _row(
            "share with that, of all threads",
            found,
            lambda one: f"{(one['held'] + one['beside']['cpu'] / one['threads']) / one['seconds']:.2%}",
        ),
        _row("one checkpoint, MB", found, lambda one: f"{one['sizes']['checkpoint'] / 1e6:.0f}"),
        _row("one checkpoint holds the training up, seconds", found, lambda one: f"{one['one']['held']:.2f}"),
        _row("one checkpoint beside the training, seconds", found, lambda one: f"{one['one']['wall']:.2f}"),
        _row("one checkpoint beside the training, CPU seconds", found, lambda one: f"{one['one']['cpu']:.2f}"),
        _row(
            f"share at one checkpoint in {MINUTES:g} minutes, CPU time included",
            found,
            lambda one: f"{(one['one']['held'] + one['one']['cpu'] / one['threads']) / interval:.2%}",
        ),
        "",
        "The demo's recipes on SmolLM2-135M (two evaluations, each a new best, whose weights are saved), with a few "
        "rows judged at the end. The demo is shorter than the default interval, so one checkpoint is written at its "
        f"end and told apart. {platform.system()}, {first['threads']} threads, torch {first['torch']}; "
        "a machine that others used as well.",
    ]
    return "\n".join(lines)


def _row(title: str, found: dict[str, dict[str, Any]], say: Any) -> str:
    return f"| {title} | " + " | ".join(say(found[name]) for name in METHODS) + " |"


if __name__ == "__main__":
    main()
