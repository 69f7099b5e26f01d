"""Accuracy and speed from nothing, on the same cells: our network for cells beside scTranslator's architecture.

Both begin from random weights, learn the cells of donor P3 of pbmc_wnn_cite (14 proteins, CLR targets) and are judged
on donor P4. scTranslator (dim 32, as many genes and proteins as the table has, ids made up, for from nothing they carry
no knowledge) takes Adam with AMSGrad as published, at each of some rates.

    python bench/cells_scratch.py --data DATA --folder FOLDER --epochs 20
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells_transfer import SHARED, read

import metier
from metier.models import sctranslator

RATES = (3e-4, 1e-3)
FIGURES = ("rmse_target", "ccc_target", "pearson_target")


def prepare(data: Path, folder: Path) -> dict[str, str]:
    """The two donors as files with made-up ids, and a random scTranslator."""
    import mudata

    table = read(data / "pbmc_wnn_cite.h5mu", list(SHARED.values()))
    genes, proteins = table["rna"].n_vars, table["prot"].n_vars
    table["rna"].var["my_Id"] = np.arange(1, genes + 1)
    table["prot"].var["my_Id"] = np.arange(genes + 1, genes + proteins + 1)
    files = {}
    for donor in ("P3", "P4"):
        rows = np.flatnonzero(table["rna"].obs["donor"].astype(str).to_numpy() == donor)
        files[donor] = str(folder / f"{donor}.h5mu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mudata.MuData({name: table[name][rows].copy() for name in ("rna", "prot")}).write_h5mu(files[donor])
    torch.manual_seed(0)
    network = sctranslator.ScTranslator(sctranslator.Shape.of(32, genes, proteins))
    sctranslator.export_original(network, folder / "random.pt")
    return files


def train(folder: Path, name: str, base: str, files: dict[str, str], settings: dict[str, Any]) -> metier.Run:
    """One run."""
    return metier.train(
        {
            "model": {"base": base, "threads": 1},
            "data": {"train": files["P3"], "test": files["P4"], "validation": 0.2, "group": "none"},
            "task": {"kind": "cells", "transform": "clr"},
            "method": "full",
            "train": {"evaluations": 10, "micro_batch_tokens": 65_536, **settings},
            "evaluate": {"rows": None, "retention": "off"},
            "export": {"folder": str(folder / name)},
        }
    )


def main() -> None:
    """Train, choose by validation, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/metier-scratch"))
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ["METIER_CACHE"] = str(given.folder / "cache")
    files = prepare(given.data, given.folder)
    ours = {"learning_rate": 2e-3, "epochs": 60, "batch_size": 32}
    runs = {"our network": train(given.folder, "ours", "new:cells", files, ours)}
    for rate in RATES:
        published = {
            "learning_rate": rate,
            "epochs": given.epochs,
            "batch_size": 8,
            "optimizer": {"kind": "adam", "amsgrad": True},
            "schedule": {"kind": "constant"},
        }
        runs[f"scTranslator, rate {rate:g}"] = train(
            given.folder, f"theirs{rate:g}", str(given.folder / "random.pt"), files, published
        )
    print("| network | passes | validation loss | RMSE | CCC | Pearson | cells/s | training, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["kind"] == "validation"]
        steps = [line for line in lines if line["kind"] == "step"]
        cells = sum(line["weight"] for line in steps) / 14
        seconds = sum(line["seconds"] for line in steps)
        after = {m.name: m.after.value for m in run.evidence.measures}
        shown = " | ".join(f"{after[figure]:.3f}" for figure in FIGURES)
        passes, speed = steps[-1]["epoch"], cells / seconds
        print(f"| {name} | {passes:.0f} | {min(losses):.4f} | {shown} | {speed:,.1f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
