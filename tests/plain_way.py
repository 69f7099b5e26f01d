"""The plain way to loss and gradients: transformers' own code, row by row, with every score of every place."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from metier import models, tasks
from metier.data.records import Conversation, Message
from metier.recipe import ModelSection
from metier.tasks import causal

LOSS, GRADIENT = 1e-6, 1e-5
"""Asked: relative difference of the loss, and of each gradient tensor beside its largest value."""
SYSTEM = "You are the clerk of a parcel service. Answer in one short sentence, be polite, and never promise a date."
QUESTIONS = (
    ("Where is my parcel?", "It is near the door."),
    ("Where is my parcel, and why has the tracking page shown nothing new for two days?", "We look into it."),
    ("I was charged twice for the same order; please refund one of the payments.", "Refunded."),
    ("我的包裹还没有到。", "请看物流页面。"),
    ("x", "y"),
    ("How do I change the address of my next delivery before it leaves the house?", "On the page of the order."),
    ("Where is my parcel?", "At the neighbour's."),
)
LABELS = ("billing", "delivery", "other")


def chats(*, system):
    head = (Message("system", SYSTEM),) if system else ()
    return [
        Conversation(f"r:{i}", (*head, Message("user", ask), Message("assistant", reply)))
        for i, (ask, reply) in enumerate(QUESTIONS)
    ]


class ExactRMSNorm(nn.Module):
    """The published formula in the format of its input; transformers' own rounds to float32, whatever it is given."""

    def __init__(self, weight, eps, offset):
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.weight + self.offset)


def with_exact_norms(module):
    for path, part in list(module.named_modules()):
        if type(part).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            eps = getattr(part, "variance_epsilon", None) or part.eps
            offset = 1.0 if type(part).__name__.startswith("Gemma") else 0.0
            setattr(module.get_submodule(parent), name, ExactRMSNorm(part.weight, eps, offset))
    return module


def exact(folder, section, rows, *, head, dtype=torch.float64):
    """A network in float64 that drops nothing, the task suited to it, and the rows as examples."""
    model = models.load(ModelSection(base=str(folder)), head=head, labels=LABELS if head == "classifier" else None)
    module = with_exact_norms(model.module.to(dtype))
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "hidden_dropout_prob"):
        if hasattr(module.config, name):
            setattr(module.config, name, 0.0)
    task = tasks.build(section, model.tokenizer, head=head, labels=LABELS, context=tiny.CONTEXT, seed=0)
    return SimpleNamespace(module=module, plain=task, examples=task.encode(rows, training=True))


def reference(module, plain, examples):
    """Loss and gradients of the plain way: padded rows one by one, every score of every place."""
    module.train().zero_grad(set_to_none=True)
    total = 0.0
    for example in examples:
        ids = example.ids[None]
        scores = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if isinstance(example, causal.TokenRow):
            learnt = example.learnt[1:]
            nats = F.cross_entropy(scores[0, :-1][learnt].double(), ids[0, 1:][learnt], reduction="sum")
        else:
            nats = F.cross_entropy(scores.double(), torch.tensor([example.label]), reduction="sum")
        nats.backward()
        total += float(nats.detach())
    return total, gradients(module)


def engines(module, task, examples, most=100_000):
    """Loss and gradients of the engine's way."""
    module.train().zero_grad(set_to_none=True)
    total = 0.0
    for cut in task.cut(examples, most):
        nats = task.loss(module, task.collate([examples[i] for i in cut])).total_B.sum()
        nats.backward()
        total += float(nats.detach())
    return total, gradients(module)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def hold(found, wanted, *, loss=LOSS, gradient=GRADIENT):
    assert found[0] == pytest.approx(wanted[0], rel=loss)
    assert found[1].keys() == wanted[1].keys()
    for name, slope in wanted[1].items():
        # A tensor whose gradient is all rounding has no scale of its own: the largest gradient of all stands in.
        scale = max(float(slope.abs().max()), 1e-6 * max(float(g.abs().max()) for g in wanted[1].values()))
        apart = float((found[1][name] - slope).abs().max()) / scale
        assert apart <= gradient, f"{name}: {apart:.1e}"
