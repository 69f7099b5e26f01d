"""LLaMA-Factory: padded, grouped by length, or packed without attention across rows ("neat packing")."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import measure


def stand_in_for(name: str) -> None:
    """Let an import succeed of a package that is for sound only and whose wheels for CPUs may be missing."""
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module


def describe(job: dict[str, Any]) -> None:
    """Register the rows as a data set of conversations."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    rows = {
        "file_name": job["rows"],
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {**tags, "system_tag": "system"},
    }
    Path(job["scratch"], "dataset_info.json").write_text(json.dumps({"rows": rows}), "utf-8")


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """What LLaMA-Factory is asked for."""
    packed = {
        "packing": True,
        "neat_packing": True,
        "cutoff_len": job["pack_length"],
        "per_device_train_batch_size": job["packs"],
    }
    padded = {
        "cutoff_len": job["max_length"],
        "per_device_train_batch_size": job["micro"],
        "gradient_accumulation_steps": job["batch"] // job["micro"],
    }
    grouped = {"train_sampling_strategy": "group_by_length"} if job["settings"] == "grouped" else {}
    lora = {"finetuning_type": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_target": "all"}
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job["model"],
        "template": "smollm2",
        "dataset": "rows",
        "dataset_dir": job["scratch"],
        "output_dir": str(Path(job["scratch"]) / "run"),
        "num_train_epochs": 1,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        **(lora if job["method"] == "lora" else {"finetuning_type": "full"}),
        **(packed if job["settings"] == "packed" else padded | grouped),
    }


def main() -> None:
    """Train for one pass."""
    job = measure.job()
    stand_in_for("torchaudio")
    from importlib.metadata import version

    meter = measure.Meter(job, version("llamafactory"))
    if job["settings"] == "grouped":
        measure.sort_whole_pass()
    if job["settings"] != "packed":
        meter.end_after(job["steps"])
    describe(job)
    from llamafactory.train.tuner import run_exp

    run_exp(arguments(job))
    meter.finish()


if __name__ == "__main__":
    main()
