"""`metier demo`: a support desk whose replies must be one strict JSON object, tuned by LoRA and fully, side by side.

Each method runs in a process of its own, so that its memory and time are its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from metier import api
from metier.core import MetierError
from metier.core.evidence import Evidence, Measure
from metier.core.files import write_text
from metier.core.log import note
from metier.evaluation import statistics
from metier.recipe import dump, parse
from metier.render.screen import screen
from metier.report import Voice, compare_table, plain, write_comparison

SYSTEM = "Reply in JSON."

METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"method": {"kind": "lora", "rank": 16, "alpha": 32}, "train": {"learning_rate": 1.5e-3}},
    "full": {"method": {"kind": "full"}, "train": {"learning_rate": 1.5e-4}},
}
"""Each method with a rate that suits it: the same rate for both would only show that one of them is wrong."""

TITLES = {"lora": "LoRA", "full": "Full"}

VOICE = Voice("en")
"""How the demo says its figures."""


@dataclass(frozen=True)
class Result:
    """What the demo found.

    Attributes:
        evidences: One for each method, by name.
        verdict: Sentences that compare them.
        report: The page that compares them.
        seconds: Wall time of it all.
    """

    evidences: Mapping[str, Evidence]
    verdict: tuple[str, ...]
    report: Path
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "verdict": list(self.verdict),
            "report": str(self.report),
            "seconds": self.seconds,
            "runs": {name: evidence.model_dump(mode="json") for name, evidence in self.evidences.items()},
        }

    def show(self) -> None:
        """The table, the verdict, the report."""
        console = screen()
        console.print(compare_table([(TITLES[name], evidence) for name, evidence in self.evidences.items()]))
        for sentence in self.verdict:
            console.print(plain(sentence), markup=False)
        console.print(f"\nreport: {self.report}   (all of it took {self.seconds:.0f} s)", markup=False, soft_wrap=True)


def run(folder: Path) -> Result:
    """Tune by both methods, compare, write the page.

    Raises:
        MetierError: If one of the runs fails; its own message has been printed.
    """
    began = time.monotonic()
    for name in METHODS:
        job = folder / f"{name}.yaml"
        write_text(job, dump(parse(recipe(name, folder))))
        note(f"== {TITLES[name]}: metier train {job}")
        done = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-m", "metier", "train", str(job)], stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise _failed(name, done.returncode)
    evidences = {name: api.Run(folder / name).evidence for name in METHODS}
    verdict = compare(evidences)
    page = write_comparison(folder, [(TITLES[name], found) for name, found in evidences.items()], verdict, "en")
    return Result(evidences, verdict, page, time.monotonic() - began)


def recipe(method: str, folder: Path) -> dict[str, Any]:
    """The demo's recipe for one method; the data stand in the package."""
    desk = resources.files("metier").joinpath("assets/support_desk")
    return {
        "model": {"base": "demo:smollm2-135m"},
        "data": {name: str(desk.joinpath(f"{name}.jsonl")) for name in ("train", "validation", "test")},
        "task": {"kind": "chat", "system": SYSTEM, "max_tokens": 256},
        "method": METHODS[method]["method"],
        "train": {"epochs": 0.3, "batch_size": 2, "evaluations": 2, **METHODS[method]["train"]},
        "evaluate": {
            "rows": 100,
            "max_new_tokens": 40,
            "json_schema": str(desk.joinpath("reply.schema.json")),
            "retention": "neutral-en",
        },
        "export": {"folder": str(folder / method), "license": "apache-2.0"},
    }


def compare(evidences: Mapping[str, Evidence]) -> tuple[str, ...]:
    """What the two runs say together: who answers better, who forgot more, what the cheap way reaches."""
    lora, full = evidences["lora"], evidences["full"]
    sentences = [
        f"Exact match on {lora.setting.rows_measured} test messages: base {_value(lora, 'exact_match', before=True)}, "
        f"LoRA {_value(lora, 'exact_match')}, full {_value(full, 'exact_match')}."
    ]
    sentences.append(_difference(lora, full))
    cheap = [(b.title, f.estimate.value) for b in lora.baselines for f in b.figures if f.name == "exact_match"]
    if cheap:
        title, value = max(cheap, key=lambda pair: pair[1])
        sentences.append(f"Without tuning the best cheap way ({title.lower()}) reaches {VOICE.amount(value, 'share')}.")
    sentences.append(_forgetting(lora, full))
    return tuple(sentences)


def _difference(lora: Evidence, full: Evidence) -> str:
    """Which method answers better, by the interval of the difference on the same rows."""
    hits = [np.array([float(answer.after_right or 0) for answer in found.answers]) for found in (lora, full)]
    change = statistics.share_change(hits[0], hits[1], lora.setting.confidence)
    low, high = (VOICE.change(end, "share") for end in (change.low, change.high))
    told = f"full minus LoRA {VOICE.change(change.value, 'share')}, 95 % interval {low} to {high}"
    if change.low > 0:
        return f"Full fine-tuning answers better ({told})."
    if change.high < 0:
        return f"LoRA answers better ({told})."
    return f"The two do not differ clearly on these rows ({told})."


def _forgetting(lora: Evidence, full: Evidence) -> str:
    names = [m.name for m in lora.measures if m.group == "retention" and m.unit == "nats" and m.change is not None]
    worse = {name: _rise(lora, name) - _rise(full, name) for name in names}
    told = ", ".join(
        f"{_measure(lora, name).title} {_rise(lora, name):+.3f} / {_rise(full, name):+.3f}" for name in names
    )
    if all(value > 0 for value in worse.values()):
        who = "LoRA forgot more than full fine-tuning here"
    elif all(value < 0 for value in worse.values()):
        who = "Full fine-tuning forgot more than LoRA here"
    else:
        who = "Which method forgot more depends on the measure"
    return f"{who} (rise of the loss in nats per token, LoRA / full: {told})."


def _rise(evidence: Evidence, name: str) -> float:
    change = _measure(evidence, name).change
    return change.value if change else 0.0


def _measure(evidence: Evidence, name: str) -> Measure:
    return next(measure for measure in evidence.measures if measure.name == name)


def _value(evidence: Evidence, name: str, *, before: bool = False) -> str:
    measure = _measure(evidence, name)
    estimate = measure.before if before else measure.after
    return VOICE.amount(estimate.value, measure.unit) if estimate else "-"


class _RunFailedError(MetierError):
    """A run of the demo ended with an exit code of its own, which the demo passes on."""


def _failed(name: str, code: int) -> MetierError:
    error = _RunFailedError(f"the {name} run ended with exit code {code}", where="metier demo", hint="see above")
    error.exit_code = code  # type: ignore[misc]
    return error
