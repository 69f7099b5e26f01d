"""What a heap that keeps few holes gives: memory and speed of steps on ragged rows, in processes with and without it.

    python bench/heap.py --rows shared/data/gsm8k/train.jsonl --steps 8 --rounds 2

SmolLM2-135M in float32 on one thread, 8 rows a step, cut to packs of 1,024 tokens as on any CPU. Each line is a process
of its own, and the two ways take turns; its highest resident memory is what the operating system tells.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import islice, product
from pathlib import Path
from typing import Any

from scale import peak_bytes, speed_of_steps

METHODS = ("lora", "full")


def measure(method: str, source: Path, steps: int, budget: int) -> dict[str, float]:
    """Speed and peak memory of steps in this process; the first one is not timed."""
    import torch

    from metier import models, tasks
    from metier.adapt import adapt, lean
    from metier.data.records import Completion
    from metier.recipe import ChatTask, FullMethod, LoRAMethod, ModelSection, TrainSection

    torch.set_num_threads(1)
    loaded = models.load(ModelSection(base="demo:smollm2-135m"), head="causal")
    lora = method == "lora"
    module = adapt(loaded.module, LoRAMethod(rank=8) if lora else FullMethod(), head="causal").module
    task: Any = tasks.build(ChatTask(), loaded.tokenizer, head="causal", labels=(), context=2048, seed=0)
    section = TrainSection(batch_size=8, micro_batch_tokens=budget)
    with source.open(encoding="utf-8") as file:
        found = [json.loads(line) for line in islice(file, steps * section.batch_size)]
    rows = [Completion(f"r:{i}", row["prompt"], row["completion"]) for i, row in enumerate(found)]
    with lean(module):
        speed = speed_of_steps(
            module, task, task.encode(rows, training=True), section, adapters=lora, steps=steps - 1, warming_up=1
        )
    return {"speed": speed, "peak": peak_bytes()}


def in_own_process(method: str, given: argparse.Namespace, *, dense: bool) -> dict[str, float]:
    """The measures, from a fresh process whose heap is dense or as it comes."""
    from metier.core.heap import DENSE

    words = [sys.executable, __file__, "--rows", str(given.rows), "--steps", str(given.steps), "--measure", method]
    words += ["--budget", str(given.budget)]
    environment = {**os.environ, "GLIBC_TUNABLES": ":".join(DENSE) if dense else "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    """Take turns, and print one line for each method."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=Path, required=True, help="JSONL with prompt and completion")
    ask.add_argument("--steps", type=int, default=8)
    ask.add_argument("--rounds", type=int, default=2)
    ask.add_argument("--budget", type=int, default=1024, help="most tokens of a pack")
    ask.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.rows, given.steps, given.budget)))
        return
    print("| method | dense: GB by round | as it comes: GB by round | dense / as it comes: memory | speed |")
    print("|---|---|---|---|---|")
    for method in METHODS:
        found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for _, dense in product(range(given.rounds), (True, False)):
            found[dense].append(in_own_process(method, given, dense=dense))
        peaks, ratio = {}, {}
        for dense, told in found.items():
            peaks[dense] = ", ".join(f"{one['peak'] / 1e9:.2f}" for one in told)
        for name in ("peak", "speed"):
            dense_one, plain = (statistics.fmean(one[name] for one in found[dense]) for dense in (True, False))
            ratio[name] = dense_one / plain
        print(f"| {method} | {peaks[True]} | {peaks[False]} | {ratio['peak']:.2f} | {ratio['speed']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
