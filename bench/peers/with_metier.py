"""metier as a user runs it: a recipe file and `metier train`; the evaluation is made tiny."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import measure
import yaml


def recipe(job: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a job."""
    chat = job["kind"] == "chat"
    rows = {"train": job["rows"], "validation": job["validation"], "test": job["test"]}
    lora = {"kind": "lora", "rank": 8, "alpha": 16.0}
    return {
        "model": {"base": job["model"], "threads": job["threads"]},
        "data": {**rows, "format": "messages" if chat else "label", "overlap": "allow", "personal_data": "ignore"},
        "task": {"kind": "chat"} if chat else {"kind": "classify", "labels": job["labels"]},
        "method": lora if job["method"] == "lora" else {"kind": "full"},
        "train": {
            "epochs": 1.0,
            "batch_size": job["batch"],
            "learning_rate": job["learning_rate"],
            "schedule": "constant",
            "evaluations": 1,
            "precision": "fp32",
        },
        "evaluate": {"rows": 1, "generate": False, "retention": "off", "baselines": False},
        "export": {"folder": str(Path(job["scratch"]) / "run")},
    }


def main() -> None:
    """Train, then read the run's own log for the tokens of each step."""
    from metier.core import heap

    heap.begin_dense()  # as the command does; the process, and so its age, stays the same
    job = measure.job()
    from metier.cli import main as metier
    from metier.core.version import __version__

    meter = measure.Meter(job, __version__)
    file = Path(job["scratch"]) / "job.yaml"
    file.write_text(yaml.safe_dump(recipe(job)), "utf-8")
    sys.argv = ["metier", "train", str(file)]
    try:
        metier()
    except SystemExit as ended:
        if ended.code:
            raise
    log = Path(job["scratch"], "run", "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [line for line in map(json.loads, log) if line["kind"] == "step"]
    meter.finish([line["tokens"] for line in steps])


if __name__ == "__main__":
    main()
