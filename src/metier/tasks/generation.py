"""Letting a language model answer: greedily, or by ranking given answers.

Shapes: B prompts, T tokens of the longest prompt, K candidates, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from metier.tasks.causal import TokenRow, collate, cut_by_tokens, loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from metier.tasks.protocol import Answering


@dataclass(frozen=True)
class Trie:
    """Token sequences as a tree: what may follow what, when only these answers are allowed."""

    after: dict[tuple[int, ...], list[int]]

    @classmethod
    def of(cls, answers: Iterable[Sequence[int]]) -> Trie:
        """The tree of the given token sequences."""
        after: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            for depth, token in enumerate(answer):
                after.setdefault(tuple(answer[:depth]), set()).add(int(token))
        return cls({prefix: sorted(tokens) for prefix, tokens in after.items()})


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *more: int) -> list[int]:
    """Tokens that end an answer: the generation configuration's, the tokenizer's, and `more`."""
    config: Any = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({int(token) for token in (*named, tokenizer.eos_token_id, *more) if token is not None})


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    how: Answering,
    *,
    stops: Sequence[int],
    allowed: Trie | None = None,
) -> list[list[int]]:
    """The most likely next token, over and over.

    Args:
        model: A transformers model that can generate, bare or wrapped by peft.
        tokenizer: Its tokenizer, for the padding token.
        prompts: Token ids of each prompt, shape (T,).
        how: Limits.
        stops: Tokens that end an answer.
        allowed: Only these answers can be given, where stated.

    Returns:
        New tokens of each prompt, without the stop token and without padding.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    sizes = [len(prompt) + how.max_new_tokens for prompt in prompts]
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for group in cut_by_tokens(sizes, how.batch_tokens):
        ids_BT, mask_BT = _pad([prompts[i] for i in group], int(tokenizer.pad_token_id or 0), left=not encoder_decoder)
        out = model.generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            max_new_tokens=how.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=int(tokenizer.pad_token_id or 0),
            eos_token_id=list(stops),
            prefix_allowed_tokens_fn=_constraint(allowed, 1 if encoder_decoder else ids_BT.shape[1], stops),
            **_NEUTRAL,
        )
        start = 1 if encoder_decoder else ids_BT.shape[1]
        for index, tokens in zip(group, out[:, start:].tolist(), strict=True):
            answers[index] = _until_stop(tokens, stops)
    return answers


_NEUTRAL: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None}
"""A checkpoint's sampling habits, switched off, so that greedy means greedy."""


def _constraint(allowed: Trie | None, start: int, stops: Sequence[int]) -> Callable[[int, Tensor], list[int]] | None:
    if allowed is None:
        return None

    def may_follow(_: int, ids_T: Tensor) -> list[int]:
        return allowed.after.get(tuple(ids_T[start:].tolist())) or list(stops)

    return may_follow


def _pad(prompts: Sequence[Tensor], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), longest), pad_id)
    mask_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        where = slice(longest - len(prompt), None) if left else slice(0, len(prompt))
        ids_BT[row, where] = prompt
        mask_BT[row, where] = 1
    return ids_BT, mask_BT


def _until_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stops:
            return list(tokens[:index])
    return list(tokens)


@torch.inference_mode()
def rank(model: Any, prompts: Sequence[Tensor], candidates: Sequence[Tensor], *, batch_tokens: int) -> Tensor:
    """Log-likelihood of every candidate after every prompt, shape (B, K), in nats, summed over its tokens.

    The prompt is computed once and its keys and values serve all candidates; where the model's cache cannot be
    repeated, each candidate is scored with the prompt in front.
    """
    device = next(model.parameters()).device
    scores_BK = torch.zeros(len(prompts), len(candidates))
    for row, prompt in enumerate(prompts):
        out = model(input_ids=prompt[None].to(device), use_cache=True)
        cache = getattr(out, "past_key_values", None)
        if cache is None or not hasattr(cache, "batch_repeat_interleave"):
            scores_BK[row] = _rank_plainly(model, prompt, candidates, batch_tokens, device)
            continue
        scores_BK[row] = _rank_cached(model, out.logits[0, -1], cache, candidates, device)
    return scores_BK


def _rank_cached(model: Any, first_V: Tensor, cache: Any, candidates: Sequence[Tensor], device: torch.device) -> Tensor:
    longest = max(len(candidate) for candidate in candidates)
    ids_KT, mask_KT = _pad(candidates, 0, left=False)
    ids_KT, mask_KT = ids_KT.to(device), mask_KT.to(device)
    first_K = F.log_softmax(first_V.float(), dim=-1)[ids_KT[:, 0]]
    if longest == 1:
        return first_K.cpu()
    cache.batch_repeat_interleave(len(candidates))
    logits_KTV = model(input_ids=ids_KT[:, :-1], past_key_values=cache, use_cache=True).logits
    logp_KT = -F.cross_entropy(logits_KTV.float().transpose(1, 2), ids_KT[:, 1:], reduction="none")
    return (first_K + (logp_KT * mask_KT[:, 1:]).sum(dim=1)).cpu()


def _rank_plainly(
    model: Any, prompt: Tensor, candidates: Sequence[Tensor], batch_tokens: int, device: torch.device
) -> Tensor:
    scores_K = torch.zeros(len(candidates))
    rows = [TokenRow("", torch.cat([prompt, c]), torch.arange(len(prompt) + len(c)) >= len(prompt)) for c in candidates]
    for group in cut_by_tokens([len(row.ids) for row in rows], batch_tokens):
        batch = {name: value.to(device) for name, value in collate([rows[i] for i in group], 0).items()}
        scores_K[group] = -loss(model, batch).total_B.cpu()
    return scores_K
