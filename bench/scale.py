"""Memory and speed of the way from a file of text rows to training steps, as the number of rows grows.

Rows are made of invented words that are drawn as words of a language are (Zipf), so that the checks find neither copies
nor near copies. Each size is read, encoded and trained on in a process of its own, whose highest resident memory the
operating system tells (VmHWM). The network is a tiny Llama with random weights, so that the way of the rows shows.

    python bench/scale.py --folder FOLDER --rows 1000 10000 100000 --gigabyte
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

WORDS_IN_ROW, VOCABULARY, STEPS, BATCH = 60, 20_000, 300, 16
WORDS_IN_LONG_ROW = 300
SYLLABLES = tuple(f"{first}{second}" for first in "bdfgklmnprstvz" for second in "aeiou")


def write_rows(path: Path, rows: int, words: int, least_bytes: int = 0) -> int:
    """Write rows until there are so many and the file has so many bytes; how many there are."""
    chance = np.random.default_rng(0)
    known = ["".join(chance.choice(SYLLABLES, size=chance.integers(1, 5))) for _ in range(VOCABULARY)]
    share = 1 / np.arange(1, VOCABULARY + 1)
    edges = np.cumsum(share / share.sum())
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < rows or file.tell() < least_bytes:
            for drawn in np.searchsorted(edges, chance.random((1000, words))):
                text = " ".join(known[min(word, VOCABULARY - 1)] for word in drawn)
                file.write(json.dumps({"text": text}) + "\n")
            written += 1000
    return written


def write_model(folder: Path, sample: Path) -> None:
    """A tiny Llama with random weights and a tokenizer trained on the rows."""
    import tokenizers
    import transformers

    lines = sample.read_text("utf-8").splitlines()[:5000]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def speed_of_steps(
    module: Any, task: Any, train: Any, section: Any, *, adapters: bool = False, steps: int = STEPS, warming_up: int = 5
) -> float:
    """Tokens per second of the median step, with the heap as training keeps it; those that warm up are not counted."""
    import torch

    from metier import training
    from metier.core import heap
    from metier.training import batches

    precision = training.choose(section, torch.device("cpu"))
    task = task.suited(module)
    optimizer = training.build_optimizer(section.optimizer, module, learning_rate=1e-3, adapters=adapters)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    taken = batches.steps(len(train), section, last=steps + warming_up)
    with heap.kept():
        records = list(
            training.fit(module, task, train, taken, optimizer, schedule, precision=precision, section=section)
        )[warming_up:]
    return statistics.median(record.tokens / record.seconds for record in records)


def measure(source: Path, model: Path) -> dict[str, float]:
    """Seconds and peak memory of reading and encoding, and speed of training steps, in this process."""
    import torch

    from metier import data, models, tasks
    from metier.recipe import Recipe
    from metier.run.job import encode_splits

    torch.set_num_threads(1)
    recipe = Recipe.model_validate(
        {
            "model": {"base": str(model)},
            "task": {"kind": "complete", "max_tokens": 512},
            "data": {"train": str(source), "validation": 0.01, "test": 0.01},
            "train": {"batch_size": BATCH, "learning_rate": 1e-3},
        }
    )
    found: dict[str, float] = {}
    loaded = models.load(recipe.model, head="causal", labels=None, seed=0)
    tokenizer = models.tokenizer_of(loaded)
    task: Any = tasks.build(recipe.task, tokenizer, head="causal", labels=(), context=512, seed=0)
    found["start_bytes"], began = peak_bytes(), time.perf_counter()
    splits = data.read(recipe.data, accepts=data.formats_for("complete"))
    found["read_bytes"], found["read_seconds"] = peak_bytes(), time.perf_counter() - began
    print("read", found, file=sys.stderr, flush=True)
    began = time.perf_counter()
    train = encode_splits(task, splits)["train"]
    found["encode_bytes"], found["encode_seconds"] = peak_bytes(), time.perf_counter() - began
    print("encoded", found, file=sys.stderr, flush=True)
    found["rows"] = len(splits.train) + len(splits.validation) + len(splits.test)
    found["tokens_per_second"] = speed_of_steps(loaded.module, task, train, recipe.train)
    found["train_bytes"] = peak_bytes()
    return found


def in_own_process(source: Path, model: Path) -> dict[str, float]:
    """The measures, from a fresh process."""
    words = [sys.executable, __file__, "--measure", str(source), "--model", str(model)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_other_forms(source: Path) -> list[Path]:
    """The rows of a JSONL file also as CSV and as one JSON array."""
    table, array = source.with_suffix(".csv"), source.with_suffix(".json")
    with source.open() as rows, table.open("w", newline="") as cells, array.open("w") as elements:
        written = csv.writer(cells)
        written.writerow(["text"])
        for number, line in enumerate(rows):
            written.writerow([json.loads(line)["text"]])
            elements.write(("," if number else "[") + line.rstrip())
        elements.write("]")
    return [source, table, array]


def read_alone(source: Path) -> str:
    """One line of the table of forms: every row read once, in this process."""
    from metier.data.files import read_table

    start, began = peak_bytes(), time.perf_counter()
    rows = sum(bool(row.values) for row in read_table(str(source)).rows)
    seconds, more = time.perf_counter() - began, peak_bytes() - start
    return f"| {source.suffix} | {rows:,} | {source.stat().st_size / 1e6:,.1f} | {seconds:.1f} | {more / 1e6:,.0f} |"


def row(source: Path, found: dict[str, float]) -> str:
    """One line of the table."""
    mega = {name: (found[name] - found["start_bytes"]) / 1e6 for name in ("read_bytes", "encode_bytes", "train_bytes")}
    return (
        f"| {found['rows']:,.0f} | {source.stat().st_size / 1e6:,.1f} | {found['read_seconds']:.1f} | "
        f"{found['encode_seconds']:.1f} | {found['start_bytes'] / 1e6:,.0f} | {mega['read_bytes']:,.0f} | "
        f"{mega['encode_bytes']:,.0f} | {mega['train_bytes']:,.0f} | {found['tokens_per_second']:,.0f} |"
    )


def main() -> None:
    """Write the rows, measure each size, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/metier-scale"))
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[], help="also files of so many MB, of longer rows")
    parser.add_argument("--gigabyte", action="store_true", help="the same as --megabytes 1000")
    parser.add_argument("--forms", type=Path, help="a JSONL file, read also as CSV and JSON; nothing is trained")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(read_alone(given.read))
        return
    if given.forms:
        for form in write_other_forms(given.forms):
            subprocess.run([sys.executable, __file__, "--read", str(form)], check=True)
        return
    if given.measure:
        print(json.dumps(measure(given.measure, given.model)))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("METIER_CACHE", str(given.folder / "cache"))
    wanted = [(given.folder / f"{rows}.jsonl", rows, WORDS_IN_ROW, 0) for rows in given.rows]
    sizes = [*given.megabytes, *([1000] if given.gigabyte else [])]
    wanted += [(given.folder / f"{size}MB.jsonl", 0, WORDS_IN_LONG_ROW, size * 1_000_000) for size in sizes]
    model = given.folder / "model"
    print(
        "| rows | file, MB | read, s | encode, s | start, MB | read, + MB | encoded, + MB | trained, + MB | tokens/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for source, rows, words, least in wanted:
        if not source.exists():
            write_rows(source, rows, words, least)
        if not model.exists():
            write_model(model, source)
        print(row(source, in_own_process(source, model)), flush=True)


if __name__ == "__main__":
    main()
