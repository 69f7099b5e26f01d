"""`train:` -- how the parameters move."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from metier.recipe.section import KindOrWord, Section

Decay = Annotated[float, Field(ge=0, lt=1)]
StatesName = Literal["fp32", "int8"]
"""In which number format an optimizer keeps its moments."""


class AdamW(Section):
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter 2019, arXiv:1711.05101."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    weight_decay: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Pull towards zero; "auto" is 0 for adapters and 0.01 else. Biases and norms are never decayed."""
    states: StatesName = "fp32"
    """Format of the moments; "int8" keeps them in 8 bits with a scale for each block, on CUDA, by bitsandbytes. Source: Dettmers et al. 2022, arXiv:2110.02861."""
    during_backward: bool = False
    """Step each parameter inside the backward pass, as soon as its gradient is whole, and free the gradient. Nobody knows the norm of the whole gradient by then, so `max_grad_norm` must be null. A batch that needs several passes still sums its gradients and steps in the last one: memory is saved where a batch is one pass. Source: Lv et al. 2024, arXiv:2306.09782."""


class Adam(Section):
    """Adam, also as AMSGrad. Source: Kingma and Ba 2015, arXiv:1412.6980; Reddi et al. 2018, arXiv:1904.09237."""

    kind: Literal["adam"] = "adam"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    amsgrad: bool = False
    """Keep the largest second moment seen, as the single-cell tutorial does."""
    states: StatesName = "fp32"
    """Format of the moments, as for adamw; "int8" does not go with `amsgrad`."""
    during_backward: bool = False
    """Step each parameter inside the backward pass, as for adamw."""

    @field_validator("states")
    @classmethod
    def _three_states_need_fp32(cls, states: StatesName, info: ValidationInfo) -> StatesName:
        if states == "int8" and info.data.get("amsgrad"):
            raise ValueError("8-bit moments exist without amsgrad alone: take fp32, or set amsgrad to false")
        return states


OptimizerSection = Annotated[Annotated[AdamW | Adam, Field(discriminator="kind")], KindOrWord(usual="adamw")]


class Constant(Section):
    """The rate stays."""

    kind: Literal["constant"] = "constant"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the rate rises from 0."""


class Linear(Section):
    """The rate falls in a line to 0."""

    kind: Literal["linear"] = "linear"
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps over which the rate rises from 0."""


class Cosine(Section):
    """The rate falls along half a cosine to 0. Source: Loshchilov and Hutter 2017, arXiv:1608.03983."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps over which the rate rises from 0."""


class Step(Section):
    """StepLR: the rate is multiplied by `gamma` every `step_size` epochs."""

    kind: Literal["step"] = "step"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the rate rises from 0."""
    step_size: int = Field(default=1, ge=1)
    """Epochs between two cuts."""
    gamma: float = Field(default=0.9, gt=0, le=1)
    """What is left of the rate after a cut."""


ScheduleSection = Annotated[
    Annotated[Constant | Linear | Cosine | Step, Field(discriminator="kind")],
    KindOrWord(usual="linear"),
]


PrecisionName = Literal["fp32", "mixed", "bf16"]
"""In which number format weights rest and arithmetic is done."""


UNPLANNED_TOKENS = 2048
"""Token budget of a loop that is used without a plan."""


class TrainSection(Section):
    """The optimisation."""

    learning_rate: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Peak rate; "auto" chooses by method and size and says why."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows; may be a fraction."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(default=16, ge=1)
    """Rows in one optimizer step."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    """Most tokens, padding included, in one forward pass. Bounds memory; changes no gradient. "auto": as many as gain time, fit in memory and are in a step; `metier plan` says how many and why, and a run that is resumed keeps its number."""
    optimizer: OptimizerSection = AdamW()
    """What turns gradients into steps."""
    schedule: ScheduleSection = Linear()
    """How the rate moves over the run."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Longer gradients are scaled down to this norm; null never does."""
    evaluations: int = Field(default=10, ge=1)
    """How often the validation loss is taken, evenly over the run; each time the best weights so far are kept."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better validation loss; null never stops early."""
    precision: Literal["auto", "fp32", "mixed", "bf16"] = "auto"
    """"fp32": all in single precision. "mixed": bf16 arithmetic on fp32 weights. "bf16": weights too, rounded up or down by chance so that small updates are not lost; what an adapter adds stays in fp32. "auto": mixed on a GPU that has bf16, else fp32."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep of each block only what goes into it and compute the rest again in the backward pass: the same gradient in much less memory, for about a third more time. "auto" does so only where the plan says that the run would not fit otherwise. Source: Chen et al. 2016, arXiv:1604.06174."""
    compile: bool = False
    """Compile the network's blocks with torch before the first step: some minutes for later steps that may be faster; `metier plan job.yaml --probe` measures both. Needs a C++ compiler on a CPU, triton on a GPU."""
    retain: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the general ability that must be kept, such as 0.98: after training, so much of the update is used as gains most on validation and keeps this. Kept is exp of minus the rise of the loss on general text, in nats per token; for encoders the mean cosine to the base's embeddings; for cells the base's root mean squared error over this one's, on cells that it was pretrained on. null uses all of it."""
    seed: int = Field(default=0, ge=0)
    """Seed of the new parameters, the order of the rows, dropout and the rounding of bf16 weights."""

    @field_validator("compile")
    @classmethod
    def _compiles_what_is_kept(cls, compile_: bool, info: ValidationInfo) -> bool:  # noqa: FBT001 - pydantic calls it
        if compile_ and info.data.get("activation_checkpointing") == "on":
            raise ValueError(
                "torch's compiler passes over blocks that are computed again: "
                "set one of train.compile and train.activation_checkpointing to false and off"
            )
        return compile_

    @field_validator("max_grad_norm")
    @classmethod
    def _no_norm_before_the_end(cls, norm: float | None, info: ValidationInfo) -> float | None:
        optimizer = info.data.get("optimizer")
        if norm is not None and optimizer is not None and optimizer.during_backward:
            raise ValueError(
                "optimizer.during_backward steps parameters before the norm of the whole gradient is known: "
                "set train.max_grad_norm to null, or during_backward to false"
            )
        return norm

    @field_validator("precision")
    @classmethod
    def _eight_bits_on_exact_weights(cls, precision: str, info: ValidationInfo) -> str:
        optimizer = info.data.get("optimizer")
        if precision == "bf16" and optimizer is not None and optimizer.states == "int8":
            raise ValueError(
                "the 8-bit optimizer rounds bf16 weights to nearest and so loses small updates: "
                "take mixed with optimizer.states int8, or bf16 with fp32"
            )
        return precision

    def precision_on(self, *, bf16_gpu: bool) -> PrecisionName:
        """The precision with "auto" resolved: a CPU gains nothing from bf16 without units of its own."""
        if self.precision != "auto":
            return self.precision
        return "mixed" if bf16_gpu else "fp32"

    @property
    def token_budget(self) -> int:
        """`micro_batch_tokens` as a number; `UNPLANNED_TOKENS` where nobody has planned."""
        return UNPLANNED_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps in one pass over `rows` rows; the last may be smaller."""
        return math.ceil(rows / self.batch_size)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the whole run, at least one."""
        planned = max(1, round(self.epochs * self.steps_per_epoch(rows)))
        return min(planned, self.max_steps) if self.max_steps else planned
