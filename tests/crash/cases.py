"""Small real jobs of every kind, for killing: tiny networks, a dozen steps, a checkpoint after each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tiny
from made_cells import synthetic, write_h5mu

from metier.recipe import Recipe, parse

NETWORKS = ("decoder", "encoder", "seq2seq", "cells")
METHODS = ("full", "lora")
ROWS = ("map", "streamed", "packed")
NAMES = tuple(
    f"{network}-{method}-{rows}"
    for network in NETWORKS
    for method in METHODS
    for rows in ROWS
    # Encoder-decoders and cells have no packs.
    if rows != "packed" or network in {"decoder", "encoder"}
)
STEPS = 8
"""Past the first epoch: 24 rows in batches of 4 are 6 steps."""
TEAMS = ("billing", "delivery", "returns")


def make(root: Path) -> Path:
    """Models and rows for every job, below `root`."""
    for name in ("llama", "bert", "t5"):
        tiny.make(name, root / name)
    said = [(f"Message {i}: the order {i * 37} came {i % 9} days late", TEAMS[i % 3]) for i in range(40)]
    chat = [{"prompt": text, "completion": f"It goes to {team}, {i}"} for i, (text, team) in enumerate(said)]
    _write(root / "chat.jsonl", chat)
    _write(root / "class.jsonl", [{"text": text, "label": team} for text, team in said])
    rna, proteins = synthetic(cells=60)
    write_h5mu(root / "cells.h5mu", rna=rna, prot=proteins)
    return root


def recipe(root: Path, name: str, folder: Path, **sections: Any) -> Recipe:
    """The recipe of a job."""
    network, method, rows = name.split("-")
    base, data, task = {
        "decoder": ("llama", "chat.jsonl", "chat"),
        "encoder": ("bert", "class.jsonl", "classify"),
        "seq2seq": ("t5", "chat.jsonl", "chat"),
        "cells": ("new:cells", "cells.h5mu", "cells"),
    }[network]
    tree: dict[str, Any] = {
        "model": {
            "base": base if network == "cells" else str(root / base),
            "device": "cpu",
            # What is attended to eagerly is padded.
            "attention": "auto" if rows == "packed" or network == "cells" else "eager",
        },
        "data": {"train": str(root / data), "validation": 0.2, "test": 0.2},
        "task": task,
        # Dropout, so that chance that is not brought back shows.
        "method": {"kind": "lora", "rank": 2, "dropout": 0.2} if method == "lora" else "full",
        "train": {
            "max_steps": STEPS,
            "epochs": 9,
            "batch_size": 4,
            "evaluations": 4,
            "learning_rate": 1e-4 if network == "cells" else 0.01,
            "micro_batch_tokens": 256,
        },
        "evaluate": {"rows": 3, "max_new_tokens": 2, "retention": "off", "baselines": False},
        # A checkpoint after every step.
        "export": {"folder": str(folder), "checkpoint_minutes": 1e-9},
    }
    if network == "cells" and method == "lora":
        tree["model"]["base"] = str(root / "cells-base")
    for section, keys in sections.items():
        tree[section] = {**tree[section], **keys}
    return parse(tree)


def result(folder: Path) -> str:
    """Hex sha256 over what a finished run hands over: weights, and what reads text for them."""
    digest = hashlib.sha256()
    left_out = {
        "env.json",
        "evidence.json",
        "README.md",
        "report.html",
        "metrics.jsonl",
        "job.yaml",
        "job.resolved.yaml",
    }
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in left_out:
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """Every step and validation of the log, without clocks."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(line["kind"], line["step"], line["loss"], line.get("grad_norm")) for line in lines]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
