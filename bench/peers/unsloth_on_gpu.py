"""Training speed of Unsloth on one GPU, on the rows, shapes and settings of `on_gpu.py`.

    python bench/peers/unsloth_on_gpu.py 0.6B lora --steps 16

To be run in Unsloth's environment. Its packs have no padding, as by its own default; the last line printed is JSON:
tokens/s, peak bytes, seconds of the first step and of every one, and whose attention it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

WORK = Path("build/unsloth").resolve()
os.environ.update(
    HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_COMPILE_LOCATION=str(WORK / "compiled"),
    PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
)  # fmt: skip
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import on_gpu  # noqa: E402 - found once the path is there

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save(shape: str) -> None:
    """Save a network of random weights and a tokenizer: Unsloth loads from a folder."""
    half = WORK / f"{shape}.part"
    on_gpu.network(shape, "cuda").save_pretrained(half)
    on_gpu.tokenizer().save_pretrained(half)
    half.rename(WORK / shape)


def main() -> None:
    """Train, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(on_gpu.SHAPES))
    parser.add_argument("method", choices=["lora", "full"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.save:
        save(given.shape)
        return
    if not (WORK / given.shape).is_dir():
        # In a process of its own: its memory goes, and transformers is not imported before unsloth.
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--save"], check=True)
    print(json.dumps(measured(given.shape, given.method, given.steps)))


def measured(shape: str, method: str, steps: int) -> dict[str, Any]:
    """Steps of Unsloth's trainer."""
    import unsloth  # isort: skip - first, for it changes what others import
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth.utils import attention_dispatch as attention

    class Clock(TrainerCallback):
        times: tuple[float, ...] = ()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.on_step_end()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            Clock.times += (time.perf_counter(),)

    longest, rows = 128 if shape == "tiny" else 1024, on_gpu.ROWS[shape]
    model, words = unsloth.FastLanguageModel.from_pretrained(
        str(WORK / shape), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=False,
        full_finetuning=method == "full", use_gradient_checkpointing=False, local_files_only=True,
    )  # fmt: skip
    if method == "lora":
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=LINEAR,
            use_gradient_checkpointing=False, max_seq_length=longest,
        )  # fmt: skip
    made = on_gpu.rows(steps * rows, on_gpu.SHAPES[shape]["vocab_size"], longest)  # type: ignore[call-overload]
    unlearnt = 1 - on_gpu.LEARNT
    labels = [[token if place >= len(ids) * unlearnt else -100 for place, token in enumerate(ids)] for ids in made]
    settings = SFTConfig(
        output_dir=str(WORK / "trainer"), per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        max_length=longest, max_steps=steps, bf16=True, gradient_checkpointing=False, learning_rate=1e-5,
        save_strategy="no", report_to="none", disable_tqdm=True, optim="adamw_torch_fused", logging_steps=10,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=settings, processing_class=words, callbacks=[Clock()],
        train_dataset=Dataset.from_dict({"input_ids": made, "labels": labels}),
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = [after - before for before, after in pairwise(Clock.times)]
    return {
        "rate": rows * statistics.fmean(map(len, made)) / statistics.median(seconds[on_gpu.WARM :]),
        "peak": float(torch.cuda.max_memory_allocated()),
        "first": seconds[0],
        "seconds": seconds,
        "padding_free": getattr(trainer.args, "padding_free", None),
        "attention": attention.select_attention_backend(use_varlen=True),
    }


if __name__ == "__main__":
    main()
