"""Unsloth's backend for CPUs under TRL's trainer: as it comes, or grouped by length; it packs on GPUs only."""

from __future__ import annotations

from typing import Any

import measure


def prepared(job: dict[str, Any]) -> tuple[Any, Any]:
    """The model, with adapters where they are asked for, and its tokenizer."""
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"],
        max_seq_length=job["max_length"],
        dtype=torch.float32,
        load_in_4bit=False,
        full_finetuning=job["method"] == "full",
    )
    if job["method"] == "lora":
        model = FastLanguageModel.get_peft_model(
            model,
            r=8,
            lora_alpha=16,
            lora_dropout=0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            use_gradient_checkpointing=False,
        )
    return model, tokenizer


def main() -> None:
    """Train for one pass."""
    job = measure.job()
    import unsloth  # isort: skip - before all that it patches
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from with_trl import config, pairs

    meter = measure.Meter(job, unsloth.__version__)
    if job["settings"] == "grouped":
        measure.sort_whole_pass()
    meter.end_after(job["steps"])
    model, tokenizer = prepared(job)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**config(job)),
        train_dataset=Dataset.from_list(pairs(job)),
    )
    trainer.train()
    meter.finish()


if __name__ == "__main__":
    main()
