"""Peak memory of a training step from the model's shape, by formula; nothing is loaded and nothing is run.

The formulas count what the field's eager transformers keep for the backward pass. They were held against 58 published
figures (`bench/planner.py`), and the activation term against the tensors that autograd really saves.

Terms: h hidden, f feed-forward, k keys, q queries, V vocabulary, n adapter parameters, tok tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from metier.core.evidence import Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metier.models.shape import LinearShape, Shape
    from metier.recipe.train import PrecisionName


NF4_BYTES = 0.5625
"""4 bits, and an fp32 scale for each 64 numbers. Source: QLoRA, arXiv:2305.14314, section 3."""
NF4_DOUBLE_BYTES = 0.516
"""The same with its scales quantised again. Source: QLoRA, arXiv:2305.14314, section 3."""
GPTQ_INT4_BYTES = 0.53
"""4 bits, and a scale and a zero point for each 128 numbers. Source: GPTQ, arXiv:2210.17323."""
POINTWISE_FUSED = 0.8
"""What is left of the activations where norms and the gated feed-forward part are compiled. Chosen on the torchtune
ladder of Llama-3.2-3B."""
LOGIT_BYTES_EAGER = 14
"""For each score: bf16 value 2, fp32 copy 4, log-softmax 4, fp32 gradient 4."""
LOGIT_BYTES_FP32 = 12
"""For each score: value 4, log-softmax 4, gradient 4; there is no copy to make."""
LOGIT_BYTES_CHUNKED = 4
"""For each score, with the cross-entropy in chunks after the scores are made: bf16 value 2, bf16 gradient 2."""
ATTENTION_DROPOUT_BYTES = 12
"""For each query-key pair of a head: scores, probabilities and dropped probabilities in fp32, kept where attention
dropout keeps a CPU from its fused kernel. Counted with saved-tensor hooks on BERT and GPT-2."""
HEAD_WIDTH = 64
"""Width of an attention head in BERT, RoBERTa and GPT-2; only the attention-dropout term needs it."""
CPU_OVERHEAD_BYTES = 600_000_000
"""Resident interpreter, torch and transformers. Judgement; a probe replaces it."""
CPU_HEAP_SLACK = 0.35
"""Share of activations and logits that glibc's heap holds beyond what is in use, for what is freed in the backward pass
leaves holes of other sizes. Measured with SmolLM2-135M and MiniLM at 500 to 8,000 tokens: 0.2 to 0.4; what is in use
was within 5 % of the formula by the library's own count (mallinfo2)."""
CPU_HEAP_SLACK_CUT = 0.7
"""The same where a step is cut: the next micro-batch is of another size and fits the holes of the last one badly.
Measured with both over four to six steps in packs of 1,024: 0.5 to 0.8."""
CPU_HEAP_SLACK_DENSE = 0.2
"""The same, cut or not, where the heap keeps few holes (`heap.is_dense`). Measured in bench/results/heap.md: 0.2 with
LoRA, 0.4 fully tuned, whose gradients outlive what they are made from."""
GPU_CONTEXT_BYTES = 1_000_000_000
"""CUDA context and libraries: 0.5 to 1 GB, the upper end."""
GPU_SLACK = 0.05
"""What the caching allocator holds beyond what is used."""

EXTRA_NORMS: dict[str, int] = {"qwen3": 0, "gemma3": 2, "gemma3_text": 2}
"""Families that normalise queries and keys, and how many further norms a block has beyond the usual two.
Source: their modelling code in transformers 5."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Bytes that one number takes, by its role.

    Attributes:
        linear: Weight of a linear layer inside the blocks.
        other: Every other weight: embeddings, norms, the head.
        copy: Second copy of the matrices, which autocast makes in bf16 and the backward pass needs.
        new: Weight of an adapter.
        gradient: Gradient of a number that moves.
        optimizer: Optimizer state of a number that moves, its fp32 master where it has one, and the value that it is
            pulled to where it is.
        activation: Result of a layer.
        normalised: Normalised input of a norm that moves.
        layer_input: Input kept for a layer that moves or is adapted.
        shares_inputs: Whether layers that read the same input keep it once; autocast and peft's fp32 adapters
            make a copy for each.
    """

    linear: float
    other: float
    copy: float
    new: float
    gradient: float
    optimizer: float
    activation: int
    normalised: int
    layer_input: int
    shares_inputs: bool


FP32 = Numbers(4, 4, 0, 4, 4, 8, 4, 4, 4, shares_inputs=True)
"""All in single precision with AdamW: 16 bytes for a number that moves."""
MIXED = Numbers(4, 4, 2, 4, 4, 8, 2, 4, 2, shares_inputs=False)
"""fp32 weights, bf16 arithmetic by autocast: 18 bytes for a number that moves."""
BF16 = Numbers(2, 2, 0, 2, 2, 4, 2, 2, 2, shares_inputs=True)
"""Weights, gradients and AdamW's states in bf16: 8 bytes for a number that moves."""
BF16_WITH_FP32_ADAPTERS = replace(BF16, new=4, gradient=4, optimizer=8, layer_input=4, shares_inputs=False)
"""peft's default on a bf16 base: 16 bytes for an adapter number, an fp32 copy of the input of each adapted layer."""
NF4 = replace(BF16_WITH_FP32_ADAPTERS, linear=NF4_BYTES)
"""QLoRA. Source: Dettmers et al. 2023, arXiv:2305.14314."""

BF16_ROUNDED = replace(BF16, optimizer=8)
"""Ours: weights and gradients in bf16, AdamW's states in fp32: 12 bytes for a number that moves."""

NUMBERS: dict[PrecisionName, Numbers] = {"fp32": FP32, "mixed": MIXED, "bf16": BF16_ROUNDED}
EIGHT_BIT_STATES = 2 * (1 + 4 / 256)
"""Two moments in 8 bits, and an fp32 scale for each 256 of them. Source: Dettmers et al. 2022, arXiv:2110.02861."""


@dataclass(frozen=True, slots=True)
class Moving:
    """What training changes.

    Attributes:
        parameters: Numbers that move.
        blocks: Blocks, from the top, whose activations the backward pass needs.
        new: Those numbers that are not in the shape: the adapters.
        adapted: Layers that have an adapter; empty where the weights themselves move.
    """

    parameters: int
    blocks: int
    new: int = 0
    adapted: tuple[LinearShape, ...] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """One forward and backward pass.

    Attributes:
        tokens: Tokens of the micro-batch, padding included.
        logit_bytes: Bytes for each score of the head, everything that the loss makes of it included.
        supervised_share: Share of the tokens for which the head is computed.
        checkpointing: Whether activations are computed again in the backward pass.
        early: Whether each parameter moves inside the backward pass, and its gradient is freed.
        accumulates: Whether the gradients of an earlier micro-batch of the same step are already there.
        activation_share: What is left of the activations by fusing, see `POINTWISE_FUSED`.
        dropout_tokens: Tokens whose attention probabilities are kept for each token: those of its row; 0 with a fused
            attention kernel.
        lean: Whether our own modules train: scores exist a chunk at a time, the gate's activation is computed again,
            and the attention's answer is kept once.
        head_moves: Whether the head's weight has a gradient; a lean head makes it together with the scores, beside the
            gradients that are there already.
    """

    tokens: int
    logit_bytes: float = LOGIT_BYTES_EAGER
    supervised_share: float = 1.0
    checkpointing: bool = False
    early: bool = False
    accumulates: bool = False
    activation_share: float = 1.0
    dropout_tokens: int = 0
    lean: bool = False
    head_moves: bool = False


class Memory(Value):
    """Bytes in use at the moment of the peak; they add up to it."""

    weights: int
    """Weights, copies of them and adapters."""
    optimizer: int
    """Optimizer states."""
    gradients: int
    """Gradients that exist at the peak."""
    activations: int
    """What the backward pass needs from the blocks."""
    logits: int
    """The head's scores and what the loss makes of them."""
    overhead: int
    """The process itself, device context, allocator."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.logits + self.overhead


def peak_memory(shape: Shape, moving: Moving, numbers: Numbers, work: Work) -> Memory:
    """Memory at the peak of a training step, without overhead.

    The peak stands either at the end of the forward pass (all activations and scores) or at the end of the backward
    pass (all gradients and the activations of one block):
    W + S + max(A L tok + logits, G + A tok). With checkpointing the residual stream before each block stays, and one
    block's activations at a time: e h L tok + max(A tok, logits) for the first term and e h L tok + G + A tok for the
    second; e is 2 bytes if the embeddings, whose format the stream has, rest in bf16, else 4. Where parameters move
    inside the backward pass, G is the largest gradient alone, unless those of an earlier micro-batch are there.

    Source: Korthikanti et al. 2022, arXiv:2205.05198, for counting activations by block; ZeRO, arXiv:1910.02054, for
    the states; the constants are this module's.
    """
    block = activation_bytes(shape, moving, numbers, work) * work.tokens
    kept = numbers.other * shape.hidden * moving.blocks * work.tokens if work.checkpointing else 0.0
    from metier.models.lean import CHUNK

    places = work.tokens * work.supervised_share
    logits = work.logit_bytes * shape.vocabulary * (min(places, CHUNK) if work.lean else places)
    if work.lean and work.head_moves:
        logits += numbers.gradient * shape.hidden * shape.vocabulary
    gradients = numbers.gradient * moving.parameters
    early = gradients if work.accumulates else 0.0
    if work.early and not work.accumulates:
        gradients = numbers.gradient * largest_moving(shape, moving)
    if work.checkpointing:
        forward = (early, kept + max(0.0, block - logits), logits)
    else:
        forward = (early, block * moving.blocks, logits)
    backward = (gradients, kept + min(block, block * moving.blocks), 0.0)
    at_peak = max(forward, backward, key=sum)
    return Memory(
        weights=round(weight_bytes(shape, moving, numbers)),
        optimizer=round(numbers.optimizer * moving.parameters),
        gradients=round(at_peak[0]),
        activations=round(at_peak[1]),
        logits=round(at_peak[2]),
        overhead=0,
    )


def weight_bytes(shape: Shape, moving: Moving, numbers: Numbers) -> float:
    """Weights at rest, their bf16 copies in the blocks that are differentiated, and adapters."""
    linear = matrix_parameters(shape)
    copied = linear * moving.blocks / shape.layers + shape.hidden * shape.vocabulary
    at_rest = numbers.linear * linear + numbers.other * (shape.parameters - linear)
    return at_rest + numbers.copy * copied + numbers.new * moving.new


def activation_bytes(shape: Shape, moving: Moving, numbers: Numbers, work: Work) -> float:
    """Bytes that one block keeps for each token.

    With w bytes for a result: 8h (fp32 inputs of two norms) + w(2q + 2k) (queries, attention result, keys, values)
    + 3wf (gate, its activation, up; wf without a gate). Where the weights move, the normalised values and the inputs
    of the layers come on top; with adapters, the inputs of the adapted layers.

    Source: counted with saved-tensor hooks on Llama, Qwen3 and BERT in all three precisions; agrees within 1 % for
    Llama and BERT (transformers 5, SDPA attention).
    """
    hidden, wide = shape.hidden, shape.feed_forward
    results = 2 * query_width(shape) + 2 * shape.key_value + (3 if shape.gated else 1) * wide
    total = 8.0 * hidden + numbers.activation * results
    total += _extra_norm_bytes(shape, numbers, weights_move=not moving.adapted)
    if moving.adapted:
        total += numbers.layer_input * _input_widths(moving.adapted, shares=numbers.shares_inputs) / shape.layers
        if work.lean and shape.gated:
            total -= numbers.activation * (wide + query_width(shape))
    elif work.lean and shape.gated:
        total += numbers.layer_input * 2 * hidden
    else:
        readers = 2 if numbers.shares_inputs else 3 + (2 if shape.gated else 1)
        total += 2 * hidden * numbers.normalised + numbers.layer_input * (readers * hidden + wide)
    if not shape.gated:  # these older families train with attention dropout
        total += ATTENTION_DROPOUT_BYTES * hidden / HEAD_WIDTH * work.dropout_tokens
    return work.activation_share * total


def largest_moving(shape: Shape, moving: Moving) -> int:
    """Numbers of the largest tensor that moves; adapters are all small, and counted together."""
    if moving.adapted:
        return moving.parameters
    largest = max((layer.inputs * layer.outputs for layer in shape.linears), default=0)
    return min(moving.parameters, max(largest, shape.hidden * shape.vocabulary))


def matrix_parameters(shape: Shape) -> int:
    """Numbers in the linear layers of the blocks."""
    return sum(layer.inputs * layer.outputs for layer in shape.linears)


def query_width(shape: Shape) -> int:
    """Width of the queries; some families make them wider than the residual stream.

    Everything a block's layers put out is queries, keys, values, the feed-forward part, and twice the residual.
    """
    outputs = sum(layer.outputs for layer in shape.linears) // shape.layers
    rest = 2 * shape.hidden + 2 * shape.key_value + (2 if shape.gated else 1) * shape.feed_forward
    return max(shape.hidden // 2, outputs - rest)


def _extra_norm_bytes(shape: Shape, numbers: Numbers, *, weights_move: bool) -> float:
    further = EXTRA_NORMS.get(shape.model_type)
    if further is None:
        return 0.0
    width = query_width(shape) + shape.key_value + further * shape.hidden
    return width * (4 + (numbers.activation if weights_move else 0))


def _input_widths(adapted: Sequence[LinearShape], *, shares: bool) -> int:
    if not shares:
        return sum(layer.inputs for layer in adapted)
    # q_proj, k_proj and v_proj of one attention read one tensor, and so do gate_proj and up_proj.
    return sum(inputs for _, inputs in {(layer.name.rpartition(".")[0], layer.inputs) for layer in adapted})
