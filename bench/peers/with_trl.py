"""TRL's SFTTrainer: padded, grouped by length, or packed by either strategy."""

from __future__ import annotations

from typing import Any

import measure


def config(job: dict[str, Any]) -> dict[str, Any]:
    """The arguments of SFTConfig for a job."""
    packed = {
        "packing": True,
        "packing_strategy": "wrapped" if job["settings"] == "wrapped" else "bfd",
        "max_length": job["pack_length"],
        "per_device_train_batch_size": job["packs"],
    }
    padded = {
        "max_length": job["max_length"],
        "per_device_train_batch_size": job["micro"],
        "gradient_accumulation_steps": job["batch"] // job["micro"],
    }
    grouped = {"train_sampling_strategy": "group_by_length"} if job["settings"] == "grouped" else {}
    return {
        "output_dir": job["scratch"],
        "num_train_epochs": 1,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "disable_tqdm": True,
        **(packed if job["settings"] in {"packed", "wrapped"} else padded | grouped),
    }


def pairs(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows as prompt and completion, so that only the answer is learnt."""
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in measure.rows(job)]


def main() -> None:
    """Train for one pass."""
    job = measure.job()
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    meter = measure.Meter(job, trl.__version__)
    if job["settings"] == "grouped":
        measure.sort_whole_pass()
    if job["settings"] in {"default", "grouped"}:
        meter.end_after(job["steps"])
    settings = trl.SFTConfig(model_init_kwargs={"dtype": torch.float32}, **config(job))
    peft = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model=job["model"],
        args=settings,
        train_dataset=Dataset.from_list(pairs(job)),
        peft_config=peft if job["method"] == "lora" else None,
    )
    trainer.train()
    meter.finish()


if __name__ == "__main__":
    main()
