"""`model:` -- where the pretrained weights come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Section


class ModelSection(Section):
    """The pretrained model to start from."""

    base: str = Field(min_length=1)
    """Hub id ("Qwen/Qwen3-0.6B"), local folder, GGUF file, or "demo:smollm2-135m"."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; null takes the default branch."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """Attention kernels; "auto" leaves the choice to transformers."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """Where the model runs: "auto" takes the first GPU, else the CPU."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null leaves the choice to torch. The bits of a run depend on it."""
    trust_code: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    """Commit hash whose Python code the model may run; null refuses models that bring code of their own."""
