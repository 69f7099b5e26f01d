"""`model:` -- where the pretrained weights come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from metier.recipe.section import Section


class ModelSection(Section):
    """The pretrained model to start from."""

    base: str = Field(min_length=1)
    """Hub id ("Qwen/Qwen3-0.6B"), local folder, GGUF file, or "demo:smollm2-135m". For cells: a folder, a checkpoint file, or "new:cells" to begin from nothing. With `use`: a file of weights, or "new"."""
    use: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """A network of your own, "package.module:Class"; it is imported and called with `arguments`. null takes what `base` names."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """What the class that `use` names is called with."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; null takes the default branch."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """Attention kernels; "auto" leaves the choice to transformers."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """Where the model runs: "auto" takes the first GPU, else the CPU."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null leaves the choice to torch. The bits of a run depend on it."""
    trust_code: str | None = Field(default=None, pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")
    """Python code that the model brings and may run: the commit of a Hub model, or the sha256 of a folder's .py files as `metier check` names it; null refuses models that bring code of their own."""
