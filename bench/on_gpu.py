"""Training speed on one GPU: models of Qwen3's shapes with random weights, packed rows, as a share of the hardware.

    python bench/on_gpu.py                                       # metier, within ten minutes on one 80 GB card
    python bench/on_gpu.py --peer-python ENVIRONMENT/bin/python  # also TRL with Liger's kernels, from its environment

Rows are random tokens, 64 to 1,024 of them, 60 % learnt; each case is a fresh process. The share (MFU) is counted in
products of matrices that the method needs (LoRA: forward and the gradient of the inputs; full: the weights' as well),
without attention, beside the speed of a plain bf16 product on the same card.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000, "tie_word_embeddings": True},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False},
}  # fmt: skip
"""Source: the configurations that Qwen publishes with Qwen3-0.6B and Qwen3-8B."""
CASES = (("0.6B", "lora"), ("0.6B", "full"), ("8B", "lora"))
"""Full fine-tuning of 8 B parameters does not fit on one card of 80 GB."""
ROWS = {"tiny": 30, "0.6B": 30, "8B": 15}
PACK = {"tiny": 2048, "0.6B": 16_384, "8B": 8192}
"""Rows of a step and, in the mean, their tokens: what fits beside 8 B parameters on a card of 80 GB."""
PEERS = {
    "trl packed": {"packing": True, "attention": "sdpa"},
    "trl packed, flex": {"packing": True, "attention": "flex_attention"},
    "trl padded": {"packing": False, "attention": "sdpa"},
}
"""Settings of TRL, all with Liger's kernels."""
LEARNT = 0.6
GROWING = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
WARM = 3
"""Steps that are not counted: kernels are chosen, compiled and loaded in them."""


def rows(count: int, vocabulary: int, longest: int) -> list[list[int]]:
    """Random rows; every engine sees the same."""
    import torch

    chance = torch.Generator().manual_seed(0)
    sizes = torch.randint(min(64, longest // 2), longest, (count,), generator=chance).tolist()
    return [torch.randint(10, vocabulary, (size,), generator=chance).tolist() for size in sizes]


def network(shape: str, device: str, attention: str = "sdpa") -> Any:
    """A network with random weights, in bf16 on the device."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    with torch.device(device):
        config = Qwen3Config(**SHAPES[shape])
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)


def run_metier(shape: str, method: str, given: argparse.Namespace, longest: int) -> dict[str, float]:
    """Steps of metier's own loop."""
    import torch

    from metier.adapt import adapt, lean
    from metier.recipe import AdamW, CompleteTask, Constant, FullMethod, LoRAMethod, TrainSection
    from metier.tasks import build
    from metier.tasks.causal import token_row
    from metier.training import Precision, build_optimizer, build_schedule, compiled, fit
    from metier.training.batches import steps as batches

    device, steps = given.device, given.steps
    chosen = LoRAMethod(rank=16) if method == "lora" else FullMethod()
    module = adapt(network(shape, device), chosen, head="causal").module
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    task = build(CompleteTask(), tokenizer, head="causal", labels=(), context=longest, seed=0).suited(module)
    more = steps + (given.profile is not None)
    count = given.times * ROWS[shape]
    made = rows(more * count, SHAPES[shape]["vocab_size"], longest)  # type: ignore[call-overload]
    examples = [token_row("-", ids, learnt_from=round(len(ids) * (1 - LEARNT))) for ids in made]
    section = TrainSection(
        batch_size=count, max_steps=more, precision="bf16", micro_batch_tokens=given.times * PACK[shape] * 5 // 4
    )
    optimizer = build_optimizer(AdamW(), module, learning_rate=1e-5, adapters=method == "lora")
    schedule = build_schedule(Constant(), optimizer, total_steps=more, steps_per_epoch=more)
    precision = Precision("bf16", torch.device(device))
    began = time.perf_counter()
    with compiled(module) if given.compile else lean(module):
        order = batches(len(examples), section, last=more)
        course = fit(module, task, examples, order, optimizer, schedule, precision=precision, section=section)
        taken = [next(course)]
        first = time.perf_counter() - began
        taken += [next(course) for _ in range(steps - 1)]
        with profiled(given.profile):
            list(course)
    return {
        "rate": statistics.median(r.tokens / r.seconds for r in taken[WARM:]),
        "peak": peak(device),
        "first": first,
    }


def tokenizer() -> Any:
    """TRL asks for one, though the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


@contextmanager
def profiled(file: str | None) -> Iterator[None]:
    """Write which kernels took how long into the file."""
    if file is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        yield
    table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90)
    Path(file).write_text(table, "utf-8")


def run_trl(engine: str, shape: str, method: str, given: argparse.Namespace, longest: int) -> dict[str, float]:
    """Steps of TRL's trainer."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        times: tuple[float, ...] = ()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.on_step_end()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(given.device)
            Clock.times += (time.perf_counter(),)

    steps = given.steps
    made = rows(steps * ROWS[shape], SHAPES[shape]["vocab_size"], longest)  # type: ignore[call-overload]
    mask = [[int(place >= len(ids) * (1 - LEARNT)) for place in range(len(ids))] for ids in made]
    table = pyarrow.table({"input_ids": made, "completion_mask": mask})
    packs = bool(PEERS[engine]["packing"])
    settings = SFTConfig(
        output_dir="build/trl", per_device_train_batch_size=1 if packs else ROWS[shape],
        gradient_accumulation_steps=1, packing=packs, max_length=PACK[shape] if packs else longest, max_steps=steps,
        bf16=given.device == "cuda", use_liger_kernel=given.device == "cuda", gradient_checkpointing=False,
        learning_rate=1e-5, save_strategy="no", report_to="none", disable_tqdm=True,
        completion_only_loss=True,  # else the mask counts for nothing
    )  # fmt: skip
    trainer = SFTTrainer(
        model=network(shape, given.device, str(PEERS[engine]["attention"])),
        args=settings,
        processing_class=tokenizer(),
        train_dataset=Dataset(InMemoryTable(table), fingerprint="rows"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if method == "lora" else None,
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [after - before for before, after in pairwise(Clock.times)]
    sizes = [len(row["input_ids"]) for row in trainer.train_dataset]
    in_step = statistics.fmean(sizes) * (1 if packs else ROWS[shape])
    return {
        "rate": in_step / statistics.median(seconds[WARM:]),
        "peak": peak(given.device),
        "first": seconds[0],
    }


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float:
    """Most memory that the device held."""
    import torch

    return float(torch.cuda.max_memory_allocated()) if device == "cuda" else 0.0


def flops_per_token(shape: str, method: str) -> float:
    """Floating-point operations of the matrix products that a token needs."""
    s: Any = SHAPES[shape]
    heads = (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"]) * s["head_dim"]
    block = s["hidden_size"] * (heads + 3 * s["intermediate_size"])
    head = s["hidden_size"] * s["vocab_size"] * LEARNT
    return (4 if method == "lora" else 6) * (s["num_hidden_layers"] * block + head)


def product_flops(device: str) -> float:
    """Speed of a plain product of two large bf16 matrices, in operations per second."""
    import torch

    size, count = (8192, 20) if device == "cuda" else (512, 2)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for timed in (False, True):
        began = time.perf_counter()
        for _ in range(count):
            product = left @ right
        product[0, 0].item()  # waits for the device
        if timed:
            return 2.0 * size**3 * count / (time.perf_counter() - began)
    raise AssertionError


def main() -> None:
    """Run every case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="python of an environment with trl, peft and liger-kernel")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", help="one shape alone, such as 'tiny' to try the script")
    parser.add_argument("--engines", default="", help="some alone, with ; between their names")
    parser.add_argument("--compile", action="store_true", help="metier with train.compile")
    parser.add_argument("--times", type=int, default=1, help="so many times the rows of a step, metier alone")
    parser.add_argument("--profile", help="file to write metier's kernels and their times to")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    longest = 128 if given.shape == "tiny" else 1024
    if given.only:
        engine, shape, method = given.only
        mine = engine == "metier"
        told = (run_metier if mine else partial(run_trl, engine))(shape, method, given, longest)
        sys.stdout.write(json.dumps(told) + "\n")
        return
    speed = product_flops(given.device)
    print(f"a plain bf16 product: {speed / 1e12:.1f} TFLOP/s\n")
    print("| shape | method | engine | tokens/s | share of the product | peak GB | first step, s |")
    print("|---|---|---|---|---|---|---|")
    cases = [(given.shape, "lora"), (given.shape, "full")] if given.shape else CASES
    engines = [("metier", sys.executable), *((name, given.peer_python) for name in PEERS if given.peer_python)]
    for shape, method in cases:
        for engine, python in engines:
            if engine in given.engines.split(";") or not given.engines:
                found = _run(python, engine, shape, method, given)
                share = found["rate"] * flops_per_token(shape, method) / speed
                print(
                    f"| {shape} | {method} | {engine} | {found['rate']:,.0f} | {share:.0%} "
                    f"| {found['peak'] / 1e9:.1f} | {found['first']:.1f} |",
                    flush=True,
                )


def _run(python: str, engine: str, shape: str, method: str, given: argparse.Namespace) -> dict[str, float]:
    command = [python, __file__, "--only", engine, shape, method, "--device", given.device, "--steps", str(given.steps)]
    command += ["--times", str(given.times)]
    command += ["--shape", given.shape] if given.shape else []
    command += ["--compile"] if given.compile else []
    command += ["--profile", f"{given.profile}-{shape}-{method}.txt"] if given.profile and engine == "metier" else []
    # Packs of ever new sizes else leave gaps in a card's memory that no later one fits.
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **GROWING})
    if done.returncode:
        sys.exit(f"{engine}, {shape}, {method}: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
