"""A floor of what must be kept: is it met better by an earlier checkpoint, or by less of the update of the best one?

A recipe is trained with several seeds. At every evaluation the general ability is measured beside the validation loss,
on the texts that choose and report nothing; after the last step, shares of the update of the best step are. Each
earlier checkpoint is then set beside the share that gains as much, on the straight line between measured shares.

    python bench/checkpoint_or_strength.py recipes/support_desk_lora.yaml train.evaluations=6 --seeds 3
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from metier import recipe, training
from metier.evaluation.front import kept_at
from metier.experiment.base import LoadedBase
from metier.recipe import LoRAMethod, Recipe
from metier.run.job import learning_rate
from metier.run.preparation import prepare
from metier.run.story import measure_base
from metier.run.strength import Dial
from metier.tasks import mean_loss

if TYPE_CHECKING:
    from metier.run.job import Job


def main() -> None:
    """Train each seed and print one line for every evaluation."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("recipe", type=Path)
    ask.add_argument("overrides", nargs="*")
    ask.add_argument("--seeds", type=int, default=3)
    given = ask.parse_args()
    # Only losses and general texts are compared: no answer is written, no cheap way fitted.
    made = recipe.load(given.recipe, [*given.overrides, "evaluate.generate=false", "evaluate.baselines=false"])
    job = prepare(made)
    print("| seed | step | gain on validation, nats | kept | kept by the share that gains as much | difference |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        whole = not isinstance(made.method, LoRAMethod)
        base = LoadedBase(job, Path(folder), whole=whole)
        differences = [one_seed(job, base, seed, Path(folder) / str(seed)) for seed in range(given.seeds)]
    means = [fmean(some) for some in differences if some]
    print(f"\nmean difference of each seed: {', '.join(f'{100 * mean:+.1f}' for mean in means)} points")


def one_seed(job: Job, base: LoadedBase, seed: int, folder: Path) -> list[float]:
    """Train, and set each checkpoint but the best beside less of the best: the differences in what is kept."""
    rate = learning_rate(job)[0]
    made: Recipe = job.recipe.with_train(seed=seed, learning_rate=rate)
    folder.mkdir()
    with base.ready(replace(job, recipe=made)) as ready:
        module, task = ready.adapted.module, ready.job.task
        dial = Dial(
            module=module,
            new=base.model.new,
            start=folder / "start.safetensors",
            end=folder / "end.safetensors",
            validate=partial(mean_loss, task, module, job.validation),
            kept=job.keeping(base.model, module, measure_base(ready.job, base.model)),
        )
        dial.begin()
        seen: list[tuple[float, float]] = []

        def validate() -> float:
            seen.append((dial.validate(), dial.kept()))
            return seen[-1][0]

        outcome = training.run(
            module,
            task,
            job.train,
            made.train,
            learning_rate=rate,
            adapters=isinstance(made.method, LoRAMethod),
            precision=base.precision,
            validate=validate,
            places=training.Places(folder / "metrics.jsonl", folder / "checkpoints", keep=1, minutes=60),
        )
        dial.stop()
        path = dial.path(outcome.first_loss)
    every = [line["step"] for line in training.read_metrics(folder / "metrics.jsonl") if line["kind"] == "validation"]
    differences = []
    for step, (loss, held) in zip(every[1:], seen[1:], strict=True):
        gain = outcome.first_loss - loss
        beside = kept_at(path, gain)
        print(
            f"| {seed} | {step} | {gain:.3f} | {held:.1%} | {beside:.1%} | {100 * (held - beside):+.1f} |", flush=True
        )
        if step != outcome.best_step and gain > 0:
            differences.append(held - beside)
    for one in path:
        print(f"| {seed} | {one.share:.0%} of {outcome.best_step} | {one.gain:.3f} | {one.kept:.1%} | | |", flush=True)
    return differences


if __name__ == "__main__":
    main()
