"""Training speed of metier's loop beside TRL's SFTTrainer on the same work, in one interleaved run.

Both tune SmolLM2-135M-Instruct on the support-desk rows in fp32, replies only, the same batch size and number of
steps; the first steps are not counted. Each run is a fresh process; the two take turns, so that a machine whose speed
drifts treats both alike. What is compared is real tokens (padding not counted) per second of training steps.

    python bench/against_trl.py --trl-python /path/to/trl-environment/bin/python

TRL lives in an environment of its own (`pip install trl peft`); without --trl-python only metier is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SYSTEM = "Reply in JSON."


def rows(path: str) -> list[dict[str, str]]:
    """The training rows as prompt and completion."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def run_metier(model: str, data: str, method: str, batch: int, steps: int, skip: int) -> dict[str, float]:
    """Train with metier's loop; returns tokens and seconds of the counted steps."""
    from metier.adapt import adapt
    from metier.core import heap
    from metier.data import Completion
    from metier.models import load
    from metier.recipe import AdamW, ChatTask, Constant, FullMethod, LoRAMethod, ModelSection, TrainSection
    from metier.tasks import build
    from metier.training import build_optimizer, build_schedule, choose, fit
    from metier.training.batches import steps as cut_steps

    loaded = load(ModelSection(base=model), head="causal")
    task = build(ChatTask(system=SYSTEM), loaded.tokenizer, head="causal", labels=(), context=2048, seed=0)
    records = [Completion(str(i), row["prompt"], row["completion"]) for i, row in enumerate(rows(data))]
    examples = task.encode(records, training=True)
    chosen = LoRAMethod(rank=8) if method == "lora" else FullMethod()
    module = adapt(loaded.module, chosen, head="causal").module
    section = TrainSection(batch_size=batch, max_steps=steps, precision="fp32")
    optimizer = build_optimizer(AdamW(), module, learning_rate=1e-4, adapters=method == "lora")
    schedule = build_schedule(Constant(), optimizer, total_steps=steps, steps_per_epoch=steps)
    import torch

    order = cut_steps([task.size(example) for example in examples], section, last=steps)
    precision = choose(section, torch.device("cpu"))
    with heap.kept():
        taken = list(fit(module, task, examples, order, optimizer, schedule, precision=precision, max_grad_norm=1.0))
    counted = taken[skip:]
    return {"tokens": sum(r.tokens for r in counted), "seconds": sum(r.seconds for r in counted)}


def run_trl(model: str, data: str, method: str, batch: int, steps: int, skip: int) -> dict[str, float]:
    """Train with TRL's SFTTrainer at its defaults, replies only; returns tokens and seconds of the counted steps."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        began = ended = 0.0

        def on_step_begin(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003, ANN202, ARG002
            if state.global_step == skip:
                Clock.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003, ANN202, ARG002
            Clock.ended = time.perf_counter()

    made = [
        {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows(data)
    ]
    settings = SFTConfig(
        output_dir="/tmp/metier-bench-trl",
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        bf16=False,
        fp16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        model_init_kwargs={"dtype": torch.float32},
        seed=0,
    )
    peft = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(made),
        peft_config=peft if method == "lora" else None,
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    # Its sampler draws rows at random: the mean length is what a counted row has on average.
    tokens = (steps - skip) * batch * sum(lengths) / len(lengths)
    return {"tokens": tokens, "seconds": Clock.ended - Clock.began}


def main() -> None:
    """Take turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="python of an environment with trl and peft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=2, help="first steps that are not counted")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--only", choices=["metier", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    data = str(Path(__file__).parents[1] / "src/metier/assets/support_desk/train.jsonl")
    if given.only:
        run = run_metier if given.only == "metier" else run_trl
        sys.stdout.write(json.dumps(run(given.model, data, given.methods, given.batch, given.steps, given.skip)) + "\n")
        return
    from metier.models import demo

    model = str(demo.folder())
    print(f"SmolLM2-135M, fp32, batch {given.batch}, {given.steps - given.skip} counted steps, {given.rounds} rounds\n")
    print("| method | metier tokens/s | TRL tokens/s | ratio, round by round | median ratio |")
    print("|---|---|---|---|---|")
    for method in given.methods.split(","):
        speeds: dict[str, list[float]] = {"metier": [], "trl": []}
        for _ in range(given.rounds):
            speeds["metier"].append(_speed(sys.executable, "metier", model, method, given))
            if given.trl_python:
                speeds["trl"].append(_speed(given.trl_python, "trl", model, method, given))
        ratios = [a / b for a, b in zip(speeds["metier"], speeds["trl"], strict=False)]
        mine, theirs = (", ".join(f"{s:.0f}" for s in speeds[name]) or "not run" for name in ("metier", "trl"))
        told = ", ".join(f"{ratio:.2f}" for ratio in ratios) or "-"
        print(
            f"| {method} | {mine} | {theirs} | {told} | {statistics.median(ratios) if ratios else float('nan'):.2f} |"
        )


def _speed(python: str, which: str, model: str, method: str, given: argparse.Namespace) -> float:
    command = [python, __file__, "--only", which, "--model", model, "--methods", method]
    command += ["--batch", str(given.batch), "--steps", str(given.steps), "--skip", str(given.skip)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["tokens"] / found["seconds"]


if __name__ == "__main__":
    main()
