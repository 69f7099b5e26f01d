"""Steps of several LoRA arms on one base: in one pass, beside one after the other.

Every arm takes a step on rows of its own with an adapter of its own rank, on SmolLM2-135M in float32. The two ways take
turns, so that whatever else runs on the machine meets both. Seconds are those of the processor, which other work beside
does not lengthen as it does the clock's; on a GPU they are the clock's.

    python bench/abreast.py --rows shared/data/gsm8k/train.jsonl --arms 2 4 --batch 2 8 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metier import adapt, models, tasks
from metier.data.records import Completion
from metier.recipe import ChatTask, LoRAMethod, ModelSection, TrainSection
from metier.training import Places, train_step
from metier.training.course import Course
from metier.training.passes import Passes, Runner
from metier.training.precision import Precision, choose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RANKS = (8, 16, 4, 32)


def main() -> None:
    """Measure, and print one line for each number of arms and rows."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=Path, required=True, help="JSONL with prompt and completion")
    ask.add_argument("--arms", type=int, nargs="+", default=[2, 4])
    ask.add_argument("--batch", type=int, nargs="+", default=[2, 8], help="rows of a step of one arm")
    ask.add_argument("--rounds", type=int, default=3)
    given = ask.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose(TrainSection(), device)
    model = models.load(ModelSection(base="demo:smollm2-135m"), head="causal")
    precision.place(model.module)
    task = tasks.build(ChatTask(), model.tokenizer, head="causal", labels=(), context=2048, seed=0).suited(model.module)
    with given.rows.open(encoding="utf-8") as file:
        found = [json.loads(line) for line in islice(file, 512)]
    rows = [Completion(f"r:{i}", row["prompt"], row["completion"]) for i, row in enumerate(found)]
    examples = task.encode(rows, training=True)
    print("| arms | rows | tokens | one pass, s | one after the other, s | ratio | ratios of the rounds |")
    print("|---|---|---|---|---|---|---|")
    for batch in given.batch:
        for arms in given.arms:
            print(_line(model, task, examples, precision, arms=arms, batch=batch, rounds=given.rounds), flush=True)


def _line(
    model: Any, task: Any, examples: Sequence[Any], precision: Precision, *, arms: int, batch: int, rounds: int
) -> str:
    """Take steps both ways in turn; the first round warms up and is not counted."""
    section = TrainSection(batch_size=batch, epochs=1.0, micro_batch_tokens=8192)
    one_pass, in_turn, tokens = [], [], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        modules = [adapt.beside(model.module, LoRAMethod(rank=rank), head="causal").module for rank in RANKS[:arms]]
        for module in modules:
            precision.place(module)
        network, lanes = stack.enter_context(adapt.in_one_pass(model.module, modules))
        for module in modules:
            stack.enter_context(adapt.lean(module))
        runners = [_runner(i, m, task, examples, section, folder / str(i)) for i, m in enumerate(modules)]
        passes = Passes(network, lanes, precision, section.micro_batch_tokens)
        for _ in range(rounds + 1):
            turns = [turn for runner in runners if (turn := runner.turn()) is not None]
            tokens.append(sum(turn.tokens for turn in turns) / arms)
            one_pass.append(_seconds(precision.device, partial(passes.step, turns)))
            in_turn.append(_seconds(precision.device, partial(_in_turn, modules, turns, precision)))
    ratios = [b / a for a, b in zip(one_pass[1:], in_turn[1:], strict=True)]
    return (
        f"| {arms} | {batch} | {statistics.mean(tokens[1:]):,.0f} | {statistics.median(one_pass[1:]):.2f} "
        f"| {statistics.median(in_turn[1:]):.2f} | {statistics.median(ratios):.2f} "
        f"| {', '.join(f'{ratio:.2f}' for ratio in ratios)} |"
    )


def _runner(number: int, module: Any, task: Any, examples: Any, section: TrainSection, folder: Path) -> Runner:
    places = Places(folder / "metrics.jsonl", folder / "checkpoints", keep=1, minutes=60.0)
    course = Course(
        module, section, rows=len(examples), learning_rate=1e-4, adapters=True, validate=lambda: 0.0, places=places
    )
    return Runner(number, course, task.suited(module), examples, section, score=lambda _: 0.0)


def _in_turn(modules: Sequence[Any], turns: Sequence[Any], precision: Precision) -> None:
    """A step of each arm by itself, as a run takes it."""
    for module, turn in zip(modules, turns, strict=True):
        module.train()
        task, optimizer = turn.runner.task, turn.runner.course.optimizer
        train_step(module, task, [task.collate(turn.rows)], optimizer, precision=precision, max_grad_norm=1.0)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    began = clock()
    work()
    if cuda:
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    main()
