"""From pretrained on one set of cells to another: our network, full and LoRA, beside every cheap way, over seeds.

    python bench/cells_transfer.py --data DATA --folder /tmp/transfer --seeds 3

DATA holds pbmc10k_cite.h5mu, pbmc_wnn_cite.h5mu, bmmc_cite.h5mu, its vintages _v2 and _v3, and pbmc_eccite.h5mu
(docs/evidence/cells.md says what they are). Jobs: `shared` tunes on k cells of donor P3 and tests on donor P4, 14
proteins that both sets have; `back` is the same with the donors exchanged; `donor` learns one donor of bone marrow and
tests on the other, 134 proteins; `fresh` is the same on the two vintages; `wide` splits 500 cells of 11,980 genes and
49 proteins at random. Every choice is made on cells of the training donor. The tables have the mean over seeds, and how
often ours was ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import metier

SHARED = {
    "CD127": "cd127", "CD14": "cd14", "CD15": "cd15", "CD16": "cd16", "CD19": "cd19", "CD25": "cd25", "CD3": "cd3.1",
    "CD45RA": "cd45ra", "CD45RO": "cd45ro", "CD4": "cd4.1", "CD56": "cd56.1", "CD8a": "cd8a", "PD-1": "cd279",
    "TIGIT": "tigit",
}  # fmt: skip
"""Proteins of pbmc10k_cite and the first clone of the same target in pbmc_wnn_cite."""
FIGURES = {"rmse_target": -1, "ccc_target": 1, "pearson_target": 1, "pearson_row": 1}
METHODS: dict[str, tuple[Any, float]] = {"full": ("full", 1e-4), "LoRA": ({"kind": "lora", "rank": 8}, 5e-4)}


def pretrained(data: Path, folder: Path, seed: int) -> metier.Run:
    """The network that every job begins from."""
    return metier.train(
        {
            "model": {"base": "new:cells"},
            "data": {"train": str(data / "pbmc10k_cite.h5mu")},
            "task": "cells",
            "method": "full",
            "train": {
                "learning_rate": 2e-3,
                "epochs": 60,
                "batch_size": 128,
                "optimizer": {"kind": "adamw", "weight_decay": 0.05},
                "evaluations": 60,
                "seed": seed,
            },
            "evaluate": {"rows": None},
            "export": {"folder": str(folder / f"pretrained{seed}")},
        }
    )


Split = tuple[str, int, Any, Any, Any]
"""Name, seed, table, training cells, test cells."""


def shared(data: Path, seeds: int, one: str = "P3", other: str = "P4") -> Iterator[Split]:
    """A few cells of one donor of blood, for proteins that are known; the other donor judges."""
    table = read(data / "pbmc_wnn_cite.h5mu", list(SHARED.values()))
    donor = table["rna"].obs["donor"].astype(str).to_numpy()
    first, second = np.flatnonzero(donor == one), np.flatnonzero(donor == other)
    for k in (25, 50, 100, 200, 400):
        for seed in range(seeds):
            yield f"{one} to {other}, k = {k}", seed, table, np.random.default_rng(seed).permutation(first)[:k], second


def back(data: Path, seeds: int) -> Iterator[Split]:
    """The same the other way round."""
    return shared(data, seeds, "P4", "P3")


def donor(data: Path, seeds: int, file: str = "bmmc_cite") -> Iterator[Split]:
    """One donor of bone marrow teaches, the other judges; most proteins are new."""
    table = read(data / f"{file}.h5mu")
    whose = table["rna"].obs["donor"].astype(str).to_numpy()
    for one, other in (("s1d1", "s1d2"), ("s1d2", "s1d1")):
        for seed in range(seeds):
            yield f"{file} {one} to {other}", seed, table, np.flatnonzero(whose == one), np.flatnonzero(whose == other)


def fresh(data: Path, seeds: int) -> Iterator[Split]:
    """The same on other genes and other cells, which nobody looked at while the network was designed."""
    yield from donor(data, seeds, "bmmc_cite_v2")
    yield from donor(data, seeds, "bmmc_cite_v3")


def wide(data: Path, seeds: int) -> Iterator[Split]:
    """Many genes, few cells."""
    table = read(data / "pbmc_eccite.h5mu")
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(table.n_obs)
        yield "11,980 genes", seed, table, order[:400], order[400:]


def read(path: Path, proteins: list[str] | None = None) -> Any:
    """A set of cells, with some of its proteins."""
    import mudata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = mudata.read_h5mu(path)
        if proteins:
            table = mudata.MuData({"rna": table["rna"], "prot": table["prot"][:, proteins].copy()})
    return table


def write(table: Any, rows: Any, path: Path) -> str:
    """Some cells of a table as a file of their own."""
    import mudata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {name: table[name][np.sort(rows)].copy() for name in ("rna", "prot")}
        mudata.MuData(parts).write_h5mu(path)
    return str(path)


def measured(
    base: metier.Run, folder: Path, name: str, seed: int, train: str, test: str
) -> dict[str, dict[str, float]]:
    """Figures of every way on one job."""
    found: dict[str, dict[str, float]] = {}
    for method, (section, rate) in METHODS.items():
        place = folder / f"{name}-{seed}-{method}".replace(" ", "_").replace(",", "")
        run = metier.train(
            {
                "model": {"base": str(base.path)},
                "data": {"train": train, "test": test, "validation": 0.2, "group": "none", "seed": seed},
                # Most genes of bone marrow's panel are new to the network; it takes them up, but must be told to.
                "task": {"kind": "cells", "overlap": 0.0},
                "method": section,
                "train": {
                    "learning_rate": rate,
                    "epochs": 10,
                    "batch_size": 32,
                    "evaluations": 10,
                    "seed": seed,
                    "schedule": {"kind": "linear", "warmup": 0.05},
                },
                "evaluate": {"rows": None},
                "export": {"folder": str(place)},
            }
        )
        evidence = run.evidence
        found[f"ours, {method}"] = {m.name: m.after.value for m in evidence.measures}
        found[f"ours, {method}"]["best step"] = evidence.cost.best_step
        found["zero-shot"] = {m.name: m.before.value for m in evidence.measures if m.before}
        found |= {b.title: {f.name: f.estimate.value for f in b.figures} for b in evidence.baselines}
    return found


def show(results: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    """A table for each job."""
    for job, runs in results.items():
        print(f"\n### {job}, {len(runs)} seeds\n")
        print("| way | RMSE | CCC | Pearson | Pearson per cell | full ahead: RMSE, CCC, Pearson | LoRA ahead |")
        print("|---|---|---|---|---|---|---|")
        for way in runs[0]:
            values = {name: np.array([run[way].get(name, np.nan) for run in runs]) for name in FIGURES}
            shown = [f"{v.mean():.3f} ± {v.std(ddof=1) / len(v) ** 0.5:.3f}" for v in values.values()]
            ahead = [_ahead(runs, f"ours, {method}", way) for method in METHODS] if "ours" not in way else ["", ""]
            print(f"| {way} | {' | '.join(shown)} | {' | '.join(ahead)} |")


def _ahead(runs: list[dict[str, dict[str, float]]], ours: str, way: str) -> str:
    counts = [
        sum(sign * (run[ours][name] - run[way][name]) > 0 for run in runs) for name, sign in list(FIGURES.items())[:3]
    ]
    return ", ".join(f"{count}/{len(runs)}" for count in counts)


KINDS = {"shared": shared, "back": back, "donor": donor, "fresh": fresh, "wide": wide}


def main() -> None:
    """Run what is not there yet, then print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/metier-transfer"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ["METIER_CACHE"] = str(given.folder / "cache")
    bases = [pretrained(given.data, given.folder, seed) for seed in range(given.seeds)]
    results: dict[str, list[dict[str, dict[str, float]]]] = {}
    splits = (split for kind in given.jobs for split in KINDS[kind](given.data, given.seeds))
    for name, seed, table, train, test in splits:
        files = [write(table, rows, given.folder / f"{part}.h5mu") for part, rows in (("train", train), ("test", test))]
        results.setdefault(name, []).append(measured(bases[seed], given.folder, name, seed, *files))
        (given.folder / "results.json").write_text(json.dumps(results))
    show({"pretraining": [figures_of(base) for base in bases]} | results)


def figures_of(base: metier.Run) -> dict[str, dict[str, float]]:
    """The pretrained network on its own test cells, beside the cheap ways."""
    evidence = base.evidence
    cheap = {b.title: {f.name: f.estimate.value for f in b.figures} for b in evidence.baselines}
    own = {m.name: m.after.value for m in evidence.measures}
    return {"ours, full": own, "ours, LoRA": own, **cheap}


if __name__ == "__main__":
    main()
