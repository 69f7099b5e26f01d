"""ms-swift: padded, or grouped by length; its packing and its padding-free batches need flash attention, so a GPU."""

from __future__ import annotations

from typing import Any

import measure


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The options of `swift sft`."""
    lora = {"tuner_type": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0, "target_modules": "all-linear"}
    grouped = {"group_by_length": "true"} if job["settings"] == "grouped" else {}
    return {
        "model": job["model"],
        "check_model": "false",  # it asks a hub for a newer one
        "model_type": "llama",
        "template": "chatml",
        "dataset": job["rows"],
        "torch_dtype": "float32",
        "bf16": "false",
        "fp16": "false",
        "use_cpu": "true",
        "num_train_epochs": 1,
        "per_device_train_batch_size": job["micro"],
        "gradient_accumulation_steps": job["batch"] // job["micro"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": "false",
        "max_length": job["max_length"],
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "logging_steps": 1000,
        "output_dir": job["scratch"],
        **(lora if job["method"] == "lora" else {"tuner_type": "full"}),
        **grouped,
    }


def main() -> None:
    """Train for one pass."""
    job = measure.job()
    import swift

    meter = measure.Meter(job, swift.__version__)
    meter.end_after(job["steps"])
    if job["settings"] == "grouped":
        measure.sort_whole_pass()
    given = [word for name, value in arguments(job).items() for word in (f"--{name}", str(value))]
    swift.sft_main(given)
    meter.finish()


if __name__ == "__main__":
    main()
