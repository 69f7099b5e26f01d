"""Memory and speed of `metier predict` as the number of cells grows: synthetic cells, 4,000 genes, 100 proteins.

A network is pretrained for a few steps on synthetic cells, since neither memory nor speed depends on what it knows.
Each size is predicted in a process of its own, whose highest resident memory the operating system tells.

    python bench/cells_stream.py --folder /tmp/stream --cells 10000 100000 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import synthetic_cells

GENES, PROTEINS, DENSITY = 4000, 100, 0.02
MEASURE = """
import resource, sys, time
from metier.cli import app
began = time.perf_counter()
app(sys.argv[1:], standalone_mode=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("MEASURED", time.perf_counter() - began, peak)
"""


def pretrained(folder: Path) -> Path:
    """A run of a network for the synthetic genes."""
    run = folder / "run"
    synthetic_cells.write_rna(folder / "train.h5ad", 2000, GENES, DENSITY, seed=1)
    synthetic_cells.write_proteins(folder / "train_proteins.h5ad", 2000, PROTEINS, seed=1)
    recipe = {
        "model": {"base": "new:cells"},
        "data": {"train": str(folder / "train.h5ad"), "proteins": str(folder / "train_proteins.h5ad"), "group": "none"},
        "task": "cells",
        "method": "full",
        "train": {"max_steps": 5, "batch_size": 128, "learning_rate": 1e-3},
        "evaluate": {"baselines": False},
        "export": {"folder": str(run)},
    }
    (folder / "job.json").write_text(json.dumps(recipe))
    subprocess.run([sys.executable, "-m", "metier", "train", str(folder / "job.json"), "--quiet"], check=True)
    return run


def predict(run: Path, source: Path, output: Path) -> tuple[float, int]:
    """Seconds and peak bytes of one prediction."""
    words = ["predict", str(run), "--data", str(source), "--output", str(output), "--quiet"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], check=True, capture_output=True, text=True)
    _, seconds, peak = next(line for line in done.stdout.splitlines() if line.startswith("MEASURED")).split()
    return float(seconds), int(peak)


def main() -> None:
    """Write the cells, predict them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/metier-stream"))
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("METIER_CACHE", str(given.folder / "cache"))
    run = pretrained(given.folder)
    print("| cells | values above zero | file, MB | seconds | cells/s | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for cells in given.cells:
        source = given.folder / f"{cells}.h5ad"
        began = time.perf_counter()
        if not source.exists():
            synthetic_cells.write_rna(source, cells, GENES, DENSITY)
            print(f"written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        seconds, peak = predict(run, source, given.folder / "predicted.h5ad")
        size = source.stat().st_size / 1e6
        print(
            f"| {cells:,} | {round(cells * GENES * DENSITY):,} | {size:,.0f} | {seconds:.1f} | "
            f"{cells / seconds:,.0f} | {peak / 1e6:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
