"""What tuning must not break, measured on items that have nothing to do with the domain.

A causal language model: loss on general text and on general replies, a multiple-choice probe by likelihood, and how
far its answers to the domain's prompts moved from the base's. An encoder: whether it still finds the paraphrase of a
sentence among the paraphrases of others, and how far its embeddings moved.

Shapes: N scored tokens, V vocabulary, B texts, T tokens of the longest, H width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from metier import models
from metier.adapt import wrapped_base
from metier.core.log import progress
from metier.evaluation import values
from metier.evaluation.measured import Measured, Rows
from metier.tasks import Answering, causal, generation, score, to_device

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from metier.data.records import Record
    from metier.evaluation.pack import Item
    from metier.tasks import TextTask

LANGUAGES = {"en": "English", "zh": "Chinese"}
ANSWER_TOKENS = 96
"""Longest answer of the base that is replayed; the shipped ones are about as long."""
KL_PROMPTS = 24
"""Prompts on which the distance from the base is taken."""
KL_TOKENS = 16
"""First tokens of the base's own answer on which it is taken; log-probabilities of more would fill the memory."""


def text_rows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[causal.TokenRow]:
    """Plain texts; every token but the first is scored."""
    begin = causal.begin_ids(tokenizer)
    return [
        causal.token_row(item.where, [*begin, *causal.token_ids(tokenizer, item.keys["text"])], learnt_from=1)
        for item in items
    ]


def reply_rows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[causal.TokenRow]:
    """General requests and their answers in the model's chat template; the answer is scored."""
    rows = []
    for item in items:
        prompt = opened(item, tokenizer)
        ids = [*prompt, *causal.token_ids(tokenizer, item.keys["text"])]
        rows.append(causal.token_row(item.where, ids, learnt_from=len(prompt)))
    return rows


def opened(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A general request in the model's chat template, up to where the reply begins."""
    turns: Any = [{"role": "user", "content": item.keys["prompt"]}]
    return causal.token_ids(tokenizer, models.render_chat(tokenizer, turns, opening=True))


def answered(items: Sequence[Item], model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[causal.TokenRow]:
    """General requests with the answers that the model gives them now, and the end of each where it comes to one.

    The answer is as the model has it, token by token, so that it is as probable to the model as text can be.
    """
    prompts = [opened(item, tokenizer) for item in items]
    stops = generation.stop_ids(model, tokenizer)
    how = Answering(max_new_tokens=ANSWER_TOKENS)
    given = generation.greedy(model, tokenizer, [torch.tensor(p) for p in prompts], how, stops=stops)
    rows = []
    for item, prompt, answer in zip(items, prompts, given, strict=True):
        end = (
            [int(tokenizer.eos_token_id)] if len(answer) < ANSWER_TOKENS and tokenizer.eos_token_id is not None else []
        )
        rows.append(causal.token_row(item.where, [*prompt, *answer, *end], learnt_from=len(prompt)))
    return rows


def token_rows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[causal.TokenRow]:
    """Texts, and replies where the model has a chat template, as rows that may be trained on."""
    texts = text_rows([item for item in items if item.kind == "text"], tokenizer)
    replies = [item for item in items if item.kind == "reply"]
    return [*texts, *(reply_rows(replies, tokenizer) if tokenizer.chat_template else [])]


def choice_rows(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[causal.TokenRow]:
    """The question with each choice; the choice is scored. Latin-script choices follow a space."""
    space = "" if item.language == "zh" else " "
    prompt = [*causal.begin_ids(tokenizer), *causal.token_ids(tokenizer, item.keys["prompt"])]
    return [
        causal.token_row(
            item.where, [*prompt, *causal.token_ids(tokenizer, f"{space}{choice}")], learnt_from=len(prompt)
        )
        for choice in item.keys["choices"]
    ]


def measure_language(
    task: TextTask[Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pack: Sequence[Item],
    *,
    batch_tokens: int,
) -> dict[str, Rows]:
    """Loss on general text and replies, and the probe, by language."""
    found: dict[str, Rows] = {}
    with progress("general text", len(pack)) as show:
        for language in sorted({item.language for item in pack}):
            items = {kind: [i for i in pack if (i.kind, i.language) == (kind, language)] for kind in ("text", "reply")}
            name = LANGUAGES.get(language, language)
            if items["text"]:
                rows = text_rows(items["text"], tokenizer)
                found[f"text_{language}"] = _loss_rows(task, model, rows, f"General text, {name}", batch_tokens)
            if items["reply"] and tokenizer.chat_template:
                rows = reply_rows(items["reply"], tokenizer)
                found[f"reply_{language}"] = _loss_rows(task, model, rows, f"General replies, {name}", batch_tokens)
            choices = [item for item in pack if (item.kind, item.language) == ("choice", language)]
            if choices:
                hits = probe_hits(task, model, tokenizer, choices, batch_tokens=batch_tokens)
                found[f"probe_{language}"] = _share_rows(f"Probe, {name}", hits)
            show(sum(item.language <= language for item in pack), name)
    return found


def probe_hits(
    task: TextTask[Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_tokens: int,
) -> Any:
    """1 for each item whose right choice has the highest likelihood per character, shape (items,).

    Per character, so that long choices are not punished. Source: the acc_norm of EleutherAI's evaluation harness.
    """
    rows = [row for item in items for row in choice_rows(item, tokenizer)]
    nats = score(task, model, rows, batch_tokens=batch_tokens).total_B.tolist()
    hits = []
    for item in items:
        choices = item.keys["choices"]
        mine, nats = nats[: len(choices)], nats[len(choices) :]
        per_character = [total / len(choice) for total, choice in zip(mine, choices, strict=True)]
        hits.append(float(int(np.argmin(per_character)) == item.keys["answer"]))
    return np.array(hits)


def kept(before: Measured, after: Measured) -> float | None:
    """Share of the general ability that is kept, by the figures of the pack; None where they do not tell.

    See `core.evidence.Strength.kept`. Replies and probes are reported beside it and are no part of it.
    """
    if any(name.startswith("paraphrase_") for name in after.rows) and "drift" in after.rows:
        return _share(1 - float(after.rows["drift"].values.mean()))
    if "general_mse" in before.rows and "general_mse" in after.rows:
        was, now = (state.rows["general_mse"] for state in (before, after))
        return values.error_kept(was.values.sum() / was.weights.sum(), now.values.sum() / now.weights.sum())
    texts = [name for name in after.rows if name.startswith("text_") and name in before.rows]
    tokens = sum(after.rows[name].weights.sum() for name in texts)
    if not tokens:
        return None
    rise = sum((after.rows[name].values - before.rows[name].values).sum() for name in texts)
    return min(1.0, math.exp(-rise / tokens))


def keeping(
    task: TextTask[Any], model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Item]
) -> Callable[[], float]:
    """How to tell, again and again, what is kept of the ability that the network has now, on texts that choose.

    Args:
        task: Scores the texts; it retains something.
        model: The network, which has not moved yet.
        tokenizer: Its tokenizer.
        texts: Items of kind "text", none of them of the pack that is reported.
    """
    if task.retains == "encoder":
        words = [item.keys["text"] for item in texts]
        first = embeddings(model.eval(), tokenizer, words)
        return lambda: _share(float((embeddings(model.eval(), tokenizer, words) * first).sum(dim=1).mean()))
    rows = text_rows(texts, tokenizer)
    tokens = sum(int(row.learnt.sum()) for row in rows)

    def nats() -> float:
        return float(score(task, model, rows).total_B.sum())

    began = nats()
    return lambda: min(1.0, math.exp((began - nats()) / tokens))


@torch.inference_mode()
def log_probabilities(
    task: TextTask[Any], model: nn.Module, records: Sequence[Record], answers: Sequence[str]
) -> Tensor:
    """Log-probabilities of every token at the first tokens of the given answers, shape (N, V), float32 on the CPU.

    With the base's answers this is where the base itself would have gone, so the mean divergence there estimates
    KL(base || tuned) over answers, by one answer for each prompt.
    """
    asked = [(r, a) for r, a in zip(records, answers, strict=True) if a][:KL_PROMPTS]
    rows = task.encode([task.with_answer(record, answer) for record, answer in asked], training=False)
    device = next(model.parameters()).device
    found = []
    for row in rows:
        places = row.learnt.nonzero().squeeze(1)
        learnt = torch.zeros_like(row.learnt)
        learnt[places[:KL_TOKENS]] = True
        batch = to_device(causal.collate([causal.TokenRow(row.where, row.ids, learnt)], 0), device)
        found.append(F.log_softmax(causal.predict(model, batch).logits_NV.float(), dim=-1).cpu())
    return torch.cat(found) if found else torch.zeros(0, 1)


def divergence(base_NV: Tensor, tuned_NV: Tensor) -> Any:
    """KL(base || tuned) at each position, in nats, shape (N,)."""
    return (base_NV.exp() * (base_NV - tuned_NV)).sum(dim=1).double().numpy()


@torch.inference_mode()
def embeddings(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Mean over tokens of the trunk's last hidden states, normalised, shape (B, H), float32 on the CPU.

    Source: Reimers and Gurevych 2019, arXiv:1908.10084 (mean pooling).
    """
    network: Any = wrapped_base(model)
    trunk = network.base_model
    device = next(network.parameters()).device
    found = []
    for start in range(0, len(texts), 32):
        coded = tokenizer(
            list(texts[start : start + 32]), padding=True, truncation=True, max_length=256, return_tensors="pt"
        ).to(device)
        hidden_BTH = trunk(input_ids=coded["input_ids"], attention_mask=coded["attention_mask"]).last_hidden_state
        mask_BT1 = coded["attention_mask"][..., None].to(hidden_BTH.dtype)
        pooled_BH = (hidden_BTH * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
        found.append(F.normalize(pooled_BH.float(), dim=1).cpu())
    return torch.cat(found)


def measure_encoder(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pack: Sequence[Item]
) -> tuple[dict[str, Rows], Tensor]:
    """Whether each sentence finds its own paraphrase among all, by language; and the embeddings of all sentences.

    The sentences with the same words and another meaning only count for the embeddings: good encoders take them for
    nearer than a paraphrase, so they would leave nothing to lose.
    """
    triples = [item for item in pack if item.kind == "triple"]
    found: dict[str, Rows] = {}
    vectors = []
    for language in sorted({item.language for item in triples}):
        mine = [item for item in triples if item.language == language]
        anchor, same, other = (
            embeddings(model, tokenizer, [item.keys[key] for item in mine]) for key in ("anchor", "same", "other")
        )
        hits = ((anchor @ same.T).argmax(dim=1) == torch.arange(len(mine))).double().numpy()
        name = LANGUAGES.get(language, language)
        found[f"paraphrase_{language}"] = _share_rows(f"Paraphrase probe, {name}", hits)
        vectors += [anchor, same, other]
    return found, torch.cat(vectors) if vectors else torch.zeros(0, 1)


def _share(cosine: float) -> float:
    return min(1.0, max(0.0, cosine))


def distance_rows(title: str, unit: Any, values: Any) -> Rows:
    """A distance from the base, which has no value before."""
    return Rows(title, "retention", "distance", unit, False, values, np.ones_like(values))  # noqa: FBT003


def chance_notes(rows: Mapping[str, Rows]) -> tuple[str, ...]:
    """A note for each probe that the base answers no better than chance: it has nothing to lose there."""
    notes = []
    for name, probe in rows.items():
        kind = name.partition("_")[0]
        if kind in {"probe", "paraphrase"}:
            n = len(probe.values)
            chance = 0.25 if kind == "probe" else 1 / n
            if probe.values.mean() < chance + 2 * math.sqrt(chance * (1 - chance) / n):
                notes.append(f"{probe.title}: the base does no better than chance, so that row cannot show forgetting")
    return tuple(notes)


def _loss_rows(
    task: TextTask[Any], model: nn.Module, rows: Sequence[causal.TokenRow], title: str, batch_tokens: int
) -> Rows:
    loss = score(task, model, rows, batch_tokens=batch_tokens)
    return Rows(title, "retention", "ratio", "nats", False, loss.total_B.numpy(), loss.weight_B.numpy())  # noqa: FBT003


def _share_rows(title: str, hits: Any) -> Rows:
    return Rows(title, "retention", "share", "share", True, hits, np.ones_like(hits))  # noqa: FBT003
