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
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

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
LEARNT = 0.6


def rows(count: int, vocabulary: int, longest: int) -> list[list[int]]:
    """Random rows; every engine sees the same."""
    import torch

    chance = torch.Generator().manual_seed(0)
    sizes = torch.randint(min(64, longest // 2), longest, (count,), generator=chance).tolist()
    return [torch.randint(10, vocabulary, (size,), generator=chance).tolist() for size in sizes]


def network(shape: str, device: str) -> Any:
    """A network with random weights, in bf16 on the device."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    with torch.device(device):
        return AutoModelForCausalLM.from_config(Qwen3Config(**SHAPES[shape]), dtype=torch.bfloat16)


def run_metier(shape: str, method: str, device: str, steps: int, longest: int) -> dict[str, float]:
    """Steps of metier's own loop."""
    import torch

    from metier.adapt import adapt, lean
    from metier.recipe import AdamW, CompleteTask, Constant, FullMethod, LoRAMethod, TrainSection
    from metier.tasks import build
    from metier.tasks.causal import token_row
    from metier.training import Precision, build_optimizer, build_schedule, fit
    from metier.training.batches import steps as batches

    chosen = LoRAMethod(rank=16) if method == "lora" else FullMethod()
    module = adapt(network(shape, device), chosen, head="causal").module
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    task = build(CompleteTask(), tokenizer, head="causal", labels=(), context=longest, seed=0).suited(module)
    made = rows(steps * 32, SHAPES[shape]["vocab_size"], longest)  # type: ignore[call-overload]
    examples = [token_row("-", ids, learnt_from=round(len(ids) * (1 - LEARNT))) for ids in made]
    section = TrainSection(batch_size=32, max_steps=steps, precision="bf16", micro_batch_tokens=16_384)
    optimizer = build_optimizer(AdamW(), module, learning_rate=1e-5, adapters=method == "lora")
    schedule = build_schedule(Constant(), optimizer, total_steps=steps, steps_per_epoch=steps)
    precision = Precision("bf16", torch.device(device))
    with lean(module):
        order = batches(len(examples), section, last=steps)
        taken = list(fit(module, task, examples, order, optimizer, schedule, precision=precision, section=section))
    counted = taken[2:]
    return {"tokens": sum(r.tokens for r in counted), "seconds": sum(r.seconds for r in counted), "peak": peak(device)}


def run_trl(shape: str, method: str, device: str, steps: int, longest: int) -> dict[str, float]:
    """Steps of TRL's trainer with packing and Liger's kernels."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        began = ended = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            Clock.ended = time.perf_counter()
            if state.global_step == 2:
                Clock.began = Clock.ended

    made = rows(steps * 32, SHAPES[shape]["vocab_size"], longest)  # type: ignore[call-overload]
    mask = [[int(place >= len(ids) * (1 - LEARNT)) for place in range(len(ids))] for ids in made]
    settings = SFTConfig(
        output_dir="build/trl", per_device_train_batch_size=1, gradient_accumulation_steps=1, packing=True,
        max_length=16_384, max_steps=steps, bf16=True, use_liger_kernel=True, gradient_checkpointing=False,
        learning_rate=1e-5, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=network(shape, device),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": made, "completion_mask": mask}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if method == "lora" else None,
        callbacks=[Clock()],
    )
    trainer.train()
    return {"tokens": (steps - 2) * 16_384, "seconds": Clock.ended - Clock.began, "peak": peak(device)}


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
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", help="one shape alone, such as 'tiny' to try the script")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    longest = 128 if given.shape == "tiny" else 1024
    if given.only:
        engine, shape, method = given.only
        run = run_metier if engine == "metier" else run_trl
        sys.stdout.write(json.dumps(run(shape, method, given.device, given.steps, longest)) + "\n")
        return
    speed = product_flops(given.device)
    print(f"a plain bf16 product: {speed / 1e12:.1f} TFLOP/s\n")
    print("| shape | method | engine | tokens/s | share of the product | peak GB |\n|---|---|---|---|---|---|")
    cases = [(given.shape, "lora"), (given.shape, "full")] if given.shape else CASES
    for shape, method in cases:
        for engine, python in (("metier", sys.executable), ("trl", given.peer_python)):
            if python:
                found = _run(python, engine, shape, method, given)
                rate = found["tokens"] / found["seconds"]
                share = rate * flops_per_token(shape, method) / speed
                print(f"| {shape} | {method} | {engine} | {rate:,.0f} | {share:.0%} | {found['peak'] / 1e9:.1f} |")


def _run(python: str, engine: str, shape: str, method: str, given: argparse.Namespace) -> dict[str, float]:
    command = [python, __file__, "--only", engine, shape, method, "--device", given.device, "--steps", str(given.steps)]
    command += ["--shape", given.shape] if given.shape else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{engine}, {shape}, {method}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
