"""Speed and memory of LoRA steps on SmolLM2-135M as rows grow longer: random tokens, as many rows as make one pack.

    python bench/lengths.py 256 1024 4096 8192

Each length is a process of its own, on one thread; its highest resident memory is what the operating system tells.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from scale import peak_bytes, speed_of_steps

STEP_TOKENS, STEPS = 8192, 4


def measure(length: int) -> dict[str, float]:
    """Speed and peak memory of steps on rows of so many tokens; the first step is not counted."""
    import torch

    from metier import models, tasks
    from metier.adapt import adapt, lean
    from metier.recipe import CompleteTask, LoRAMethod, ModelSection, TrainSection
    from metier.tasks.causal import token_row

    torch.set_num_threads(1)
    loaded = models.load(ModelSection(base="demo:smollm2-135m"), head="causal")
    module = adapt(loaded.module, LoRAMethod(rank=8), head="causal").module
    plain: Any = tasks.build(CompleteTask(), loaded.tokenizer, head="causal", labels=(), context=length, seed=0)
    task, chance = plain.suited(module), torch.Generator().manual_seed(0)
    rows = STEP_TOKENS // length
    drawn = torch.randint(100, 49_000, (rows * STEPS, length), generator=chance).tolist()
    examples = [token_row("-", ids, learnt_from=length // 2) for ids in drawn]
    section = TrainSection(batch_size=rows, max_steps=STEPS, micro_batch_tokens=STEP_TOKENS)
    start = peak_bytes()
    with lean(module):
        speed = speed_of_steps(module, task, examples, section, adapters=True, steps=STEPS - 1, warming_up=1)
    return {"rows": rows, "speed": speed, "start": start, "peak": peak_bytes()}


def main() -> None:
    """Measure each length in a process of its own and print the table."""
    if sys.argv[1] == "--one":
        print(json.dumps(measure(int(sys.argv[2]))))
        return
    print("| tokens of a row | rows of a step | tokens/s | start, MB | trained, + MB |\n|---|---|---|---|---|")
    for length in map(int, sys.argv[1:]):
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(length)], check=True, stdout=subprocess.PIPE, text=True
        )
        told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        more = (told["peak"] - told["start"]) / 1e6
        print(f"| {length:,} | {told['rows']} | {told['speed']:,.0f} | {told['start'] / 1e6:,.0f} | {more:,.0f} |")


if __name__ == "__main__":
    main()
