"""What it costs to read model files without running them: hostile files one by one, and a pickled module of 27 MB.

Each hostile file (tests/hostile.py) is read in a process of its own that may take 5 CPU seconds and 256 MiB more memory
than it had before; an audit hook sees what it does beside reading. The module is read whole, weights and all.

    python bench/safe_loading.py --module FILE.pt
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "safe_loading.md"
READS, SLOWEST = 7, 8


def hostile() -> list[dict[str, Any]]:
    """What came of every hostile file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "tests" / "hostile.py"), folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def module_file(folder: Path) -> Path:
    """A pickled stack of transformer layers of about 27 MB."""
    import torch

    layer = torch.nn.TransformerEncoderLayer(192, 4, 1024, batch_first=True)
    network = torch.nn.TransformerEncoder(layer, 12)
    torch.save(network, folder / "module.pt")
    return folder / "module.pt"


def reading(path: Path) -> tuple[float, int]:
    """Median CPU seconds of reading a file, and its tensors."""
    from metier.models import pickled

    seconds = []
    for _ in range(READS):
        began = time.process_time()
        found = pickled.read(path)
        seconds.append(time.process_time() - began)
    return statistics.median(seconds), len(found.tensors)


def main() -> None:
    """Measure and write the page."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--module", type=Path, help="a pickled module; without it, one is made")
    words.add_argument("--out", type=Path, default=RESULTS)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.module or module_file(Path(folder))
        (seconds, tensors), megabytes = reading(path), path.stat().st_size / 1e6
    found = hostile()
    ended = collections.Counter(row["ended"] for row in found)
    lines = [
        "# Reading model files without running them\n",
        f"```bash\npython bench/safe_loading.py{' --module sct_random.pt' if given.module else ''}\n```\n",
        "\n\n".join((Path(__file__).read_text("utf-8").split('"""')[1]).split("\n\n")[:2]) + "\n",
        f"Python {platform.python_version()}, one thread, other work beside it on the same two cores: CPU seconds.\n",
        "| what | figure |",
        "|---|---:|",
        f"| hostile files | {len(found)} |",
        f"| that ran anything | {sum(bool(row['executed'] or row['ran']) for row in found)} |",
        f"| refused with the call named (exit 77) | {ended['UnsafeError']} |",
        f"| refused as damaged (exit 65) | {ended['ModelError']} |",
        f"| otherwise | {len(found) - ended['UnsafeError'] - ended['ModelError']} |",
        f"| longest, CPU seconds | {max(row['seconds'] for row in found):.2f} |",
        f"| most memory, MiB more than before | {max(row['bytes'] for row in found) >> 20} |",
        f"| module of {megabytes:.1f} MB, {tensors} tensors, CPU seconds | {seconds:.2f} |",
        "",
        "The costliest:\n",
        "| file | CPU seconds | MiB | ended |",
        "|---|---:|---:|---|",
        *(
            f"| {row['name']} | {row['seconds']:.2f} | {row['bytes'] >> 20} | {row['ended']} |"
            for row in sorted(found, key=lambda row: -row["seconds"])[:SLOWEST]
        ),
        "",
    ]
    given.out.write_text("\n".join(lines), "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
