"""LitGPT's finetune scripts, which pad; there is no other setting.

`with_litgpt.py --convert MODEL FOLDER` writes the checkpoint that they start from.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"


def convert(model: str, folder: str) -> None:
    """Write a copy of the model in LitGPT's form."""
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    shutil.copytree(model, folder, dirs_exist_ok=True)
    convert_hf_checkpoint(checkpoint_dir=Path(folder), model_name=NAME)


def data(job: dict[str, Any]) -> Any:
    """The rows in LitGPT's columns, prompts not learnt."""
    import measure
    from litgpt.data import JSON

    folder = Path(job["scratch"]) / "data"
    folder.mkdir()
    made = []
    for row in measure.rows(job):
        system, user, answer = (turn["content"] for turn in row["messages"])
        made.append({"instruction": user, "output": answer, "sys_prompt": system})
    folder.joinpath("train.json").write_text(json.dumps(made), "utf-8")
    folder.joinpath("val.json").write_text(json.dumps(made[:1]), "utf-8")
    return JSON(json_path=folder, mask_prompt=True, prompt_style="smollm2", num_workers=0)


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """The arguments that both scripts take."""
    from litgpt.args import EvalArgs, TrainArgs

    train = TrainArgs(
        global_batch_size=job["batch"],
        micro_batch_size=job["micro"],
        epochs=2,
        max_steps=job["steps"],
        lr_warmup_steps=1,
        max_seq_length=job["max_length"],
        save_interval=None,
        log_interval=1,
    )
    return {
        "checkpoint_dir": Path(job["litgpt"]),
        "out_dir": Path(job["scratch"]) / "run",
        "precision": "32-true",
        "data": data(job),
        "train": train,
        "eval": EvalArgs(
            interval=100_000, max_new_tokens=1, max_iters=1, initial_validation=False, final_validation=False
        ),
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": job["learning_rate"]}},
    }


def main() -> None:
    """Train for one pass."""
    import measure

    job = measure.job()
    import litgpt
    from litgpt.finetune import full, lora

    meter = measure.Meter(job, litgpt.__version__ if hasattr(litgpt, "__version__") else _version())
    meter.end_after(job["steps"])
    everywhere = dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    if job["method"] == "lora":
        lora.setup(**settings(job), lora_r=8, lora_alpha=16, lora_dropout=0.0, **everywhere)
    else:
        full.setup(**settings(job))
    meter.finish()


def _version() -> str:
    from importlib.metadata import version

    return version("litgpt")


if __name__ == "__main__":
    if sys.argv[1] == "--convert":
        convert(*sys.argv[2:])
    else:
        main()
