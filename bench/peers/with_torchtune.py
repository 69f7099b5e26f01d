"""torchtune's single-device recipes, padded or packed, on a Llama of SmolLM2's sizes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import measure

WIDTHS = {
    "vocab_size": 49152,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "embed_dim": 576,
    "intermediate_dim": 1536,
    "max_seq_len": 8192,
    "rope_base": 100_000,
    "scale_factor": 1,
}
ADAPTERS = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
}


class ChatML:
    """The tokenizer that a torchtune user has to write for SmolLM2: its own tokens in ChatML turns."""

    def __init__(self, path: str, max_seq_len: int) -> None:
        """Read `tokenizer.json`."""
        from tokenizers import Tokenizer

        self._words = Tokenizer.from_file(path)
        self.max_seq_len = max_seq_len
        self.special_tokens: dict[str, int] = {}
        self.pad_id = 2

    def tokenize_messages(self, messages: list[Any], **_: Any) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them are not learnt."""
        tokens: list[int] = []
        masked: list[bool] = []
        for message in messages:
            head, body = f"<|im_start|>{message.role}\n", f"{message.text_content}<|im_end|>\n"
            for text, mask in ((head, True), (body, message.masked)):
                ids = self._words.encode(text, add_special_tokens=False).ids
                tokens += ids
                masked += [mask] * len(ids)
        return tokens, masked

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:  # noqa: ARG002, FBT001, FBT002 - torchtune's form
        """Add the tokens to a sample."""
        sample["tokens"], sample["mask"] = self.tokenize_messages(sample.pop("messages"))
        return sample


def configuration(job: dict[str, Any]) -> dict[str, Any]:
    """The recipe's configuration, as its YAML file would have it."""
    packed, lora = job["settings"] == "packed", job["method"] == "lora"
    builder = "torchtune.models.llama3_2." + ("lora_llama3_2" if lora else "llama3_2")
    length = job["pack_length"] if packed else job["max_length"]
    run = str(Path(job["scratch"]) / "run")
    return {
        "output_dir": run,
        "model": {"_component_": builder, **WIDTHS, **(ADAPTERS if lora else {})},
        "tokenizer": {
            "_component_": "with_torchtune.ChatML",
            "path": str(Path(job["model"]) / "tokenizer.json"),
            "max_seq_len": length,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": job["model"],
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": run,
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "dataset": dataset(job) | {"packed": packed},
        "seed": 0,
        "shuffle": False,
        "batch_size": job["packs"] if packed else job["micro"],
        "gradient_accumulation_steps": 1 if packed else job["batch"] // job["micro"],
        "epochs": 1,
        "max_steps_per_epoch": None,
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": job["learning_rate"]},
        "optimizer_in_bwd": False,
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "clip_grad_norm": None,
        "compile": False,
        "device": "cpu",
        "dtype": "fp32",
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": run},
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
    }


def dataset(job: dict[str, Any]) -> dict[str, Any]:
    """The rows as conversations of which the answers are learnt."""
    return {
        "_component_": "torchtune.datasets.chat_dataset",
        "source": "json",
        "data_files": job["rows"],
        "conversation_column": "messages",
        "conversation_style": "openai",
        "train_on_input": False,
        "split": "train",
    }


def recipe(job: dict[str, Any]) -> Any:
    """The recipe's class; the recipes are files that torchtune runs, not modules to import."""
    kind = "lora" if job["method"] == "lora" else "full"
    name = f"{kind}_finetune_single_device"
    folder = Path(importlib.util.find_spec("torchtune").origin).parents[1] / "recipes"
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice if kind == "lora" else module.FullFinetuneRecipeSingleDevice


def main() -> None:
    """Train for one pass."""
    job = measure.job()
    from importlib.metadata import version

    from omegaconf import OmegaConf

    meter = measure.Meter(job, version("torchtune"))
    if job["settings"] != "packed":
        meter.end_after(job["steps"])
    given = OmegaConf.create(configuration(job))
    run = recipe(job)(cfg=given)
    run.setup(cfg=given)
    run.train()
    meter.finish()


if __name__ == "__main__":
    main()
