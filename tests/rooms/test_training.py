"""The training room: rates, batches, checkpoints, and that a run which was stopped ends with the very same bits."""

import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metier import models
from metier.adapt import adapt
from metier.core import DataError, DivergedError, InterruptedRunError, RecipeError, StorageError, commits, files
from metier.data.records import Completion
from metier.models import lean
from metier.recipe import (
    Adam,
    AdamW,
    ChatTask,
    Constant,
    Cosine,
    FullMethod,
    Linear,
    LoRAMethod,
    ModelSection,
    Step,
    TrainSection,
)
from metier.tasks import build, cutting, score
from metier.training import (
    Places,
    batches,
    build_optimizer,
    build_schedule,
    checkpoint,
    choose,
    metrics,
    optim,
    read_metrics,
    run,
)
from metier.training.checkpoint import Origin, Progress
from metier.training.precision import Precision

CPU = Precision("fp32", torch.device("cpu"))
ROWS = tuple(
    Completion(f"a.jsonl:{i}", f"{sentence} {i}", f"answer {i % 3} to it" + " and more" * (i % 4))
    for i, sentence in enumerate(tiny.SENTENCES)
)
FULL, LORA = FullMethod(), LoRAMethod(rank=2, dropout=0.2)
SHORT = TrainSection(epochs=4, batch_size=4, micro_batch_tokens=128, evaluations=4, seed=5)
"""Sixteen steps over thirteen rows, four evaluations."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.make("llama", tmp_path_factory.mktemp("tiny") / "llama")
    model = models.load(ModelSection(base=str(folder)), head="causal")
    task = build(ChatTask(), model.tokenizer, head="causal", labels=(), context=tiny.CONTEXT, seed=0)
    examples = task.encode(ROWS, training=True)
    return SimpleNamespace(model=model, task=task, examples=examples[:-2], held=examples[-2:], folder=folder)


@pytest.fixture
def places(tmp_path):
    return Places(metrics=tmp_path / "metrics.jsonl", checkpoints=tmp_path / "checkpoints", keep=2, minutes=60.0)


def fresh(base, method=FULL):
    """The tiny model as a run begins with it: the same bits each time."""
    torch.manual_seed(9)
    module = copy.deepcopy(base.model.module)
    return adapt(module, method, head="causal", base_name="tiny").module


def held_out(base, module):
    """Mean nats of a token on the held-out rows."""
    loss = score(base.task, module, base.held)
    return float(loss.total_B.sum() / loss.weight_B.sum())


def train(base, module, places, section=SHORT, *, rate=1e-2, method=FULL, validate=None):
    return run(
        module,
        base.task,
        base.examples,
        section,
        learning_rate=rate,
        adapters=isinstance(method, LoRAMethod),
        precision=CPU,
        validate=validate or (lambda: held_out(base, module)),
        places=places,
    )


def weights(module):
    return {name: tensor.clone() for name, tensor in checkpoint.moving_weights(module).items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def lines(places, kind):
    return [line for line in read_metrics(places.metrics) if line["kind"] == kind]


def without_clock(found):
    clocks = ("seconds", "tokens_per_second", "memory_bytes")
    return [{key: value for key, value in line.items() if key not in clocks} for line in found]


# ------------------------------------------------------------------------------------------------ rates


def factor(section, step, total=100, per_epoch=10):
    return optim.rate_factor(section, step, total_steps=total, steps_per_epoch=per_epoch)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (Constant(), {0: 1.0, 50: 1.0, 99: 1.0}),
        (Constant(warmup=0.1), {0: 1 / 11, 9: 10 / 11, 10: 1.0, 99: 1.0}),
        (Linear(warmup=0.0), {0: 1.0, 50: 0.5, 99: 0.01, 100: 0.0, 120: 0.0}),
        (Linear(warmup=0.2), {0: 1 / 21, 19: 20 / 21, 20: 1.0, 60: 0.5, 99: 1 / 80, 100: 0.0}),
        (Cosine(warmup=0.0), {0: 1.0, 25: 0.5 + math.sqrt(0.5) / 2, 50: 0.5, 75: 0.5 - math.sqrt(0.5) / 2, 100: 0.0, 150: 0.0}),
        (Cosine(warmup=0.5), {0: 1 / 51, 49: 50 / 51, 50: 1.0, 75: 0.5, 100: 0.0}),
        (Step(), {0: 1.0, 9: 1.0, 10: 0.9, 99: 0.9**9}),
        (Step(step_size=3, gamma=0.5), {29: 1.0, 30: 0.5, 59: 0.5, 60: 0.25, 99: 0.125}),
    ],
)  # fmt: skip
def test_a_rate_has_the_values_of_its_formula(section, values):
    assert {step: factor(section, step) for step in values} == pytest.approx(values)


@settings(deadline=None)
@given(
    st.sampled_from((Constant, Linear, Cosine, Step)),
    st.floats(0, 0.99),
    st.integers(1, 300),
    st.integers(1, 50),
)
def test_a_rate_rises_through_the_warmup_and_never_after_it(kind, warmup, total, per_epoch):
    rates = [factor(kind(warmup=warmup), step, total, per_epoch) for step in range(total)]
    peak = math.ceil(warmup * total)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) or kind is Step
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize(("step_size", "gamma"), [(1, 0.9), (2, 0.3)])
def test_steps_fall_as_torch_lets_them_fall_after_each_epoch(step_size, gamma):
    theirs_on, ours_on = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3) for _ in range(2))
    theirs = torch.optim.lr_scheduler.StepLR(theirs_on, step_size, gamma)
    ours = build_schedule(Step(step_size=step_size, gamma=gamma), ours_on, total_steps=35, steps_per_epoch=7)
    for _ in range(5):
        for _ in range(7):
            assert ours_on.param_groups[0]["lr"] == pytest.approx(theirs_on.param_groups[0]["lr"], rel=1e-12)
            ours_on.step()
            theirs_on.step()
            ours.step()
        theirs.step()


def test_the_rates_of_a_run_are_the_ones_of_its_schedule(base, places):
    section = TrainSection(max_steps=5, epochs=9, batch_size=4, schedule=Linear(warmup=0.4), evaluations=1)
    train(base, fresh(base), places, section, rate=0.006)
    rates = [line["learning_rate"] for line in lines(places, "step")]
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.004, 0.002])


# ------------------------------------------------------------------------------------------------ optimizers


class Layers(nn.Module):
    """A matrix, a vector, a norm, and one matrix that stays."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.still = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(2, 2)
        self.still.requires_grad_(requires_grad=False)


def decays(module, section, *, adapters):
    optimizer = build_optimizer(section, module, learning_rate=0.1, adapters=adapters)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(
    ("asked", "adapters", "decay"), [("auto", False, 0.01), ("auto", True, 0.0), (0.3, True, 0.3), (0.0, False, 0.0)]
)
def test_matrices_are_decayed_vectors_never(asked, adapters, decay):
    assert decays(Layers(), AdamW(weight_decay=asked), adapters=adapters) == {
        "linear.weight": decay, "linear.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0,
    }  # fmt: skip


def test_adam_takes_what_it_is_told():
    optimizer = build_optimizer(Adam(betas=(0.8, 0.7), amsgrad=True), Layers(), learning_rate=0.25, adapters=False)
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["betas"], group["amsgrad"], group["lr"], group["weight_decay"]) == ((0.8, 0.7), True, 0.25, 0)
    assert len(group["params"]) == 4


def test_a_network_of_vectors_alone_has_one_group():
    assert len(build_optimizer(AdamW(), nn.LayerNorm(3), learning_rate=0.1, adapters=False).param_groups) == 1


def test_precision_is_chosen_by_device():
    cpu = torch.device("cpu")
    assert choose(TrainSection(precision="auto"), cpu).name == "fp32"
    assert choose(TrainSection(precision="bf16"), cpu).name == "bf16"
    module = nn.Linear(2, 2)
    choose(TrainSection(precision="bf16"), cpu).place(module)
    assert module.weight.dtype is torch.bfloat16
    module = nn.Linear(2, 2)
    mixed = choose(TrainSection(precision="mixed"), cpu)
    mixed.place(module)
    assert module.weight.dtype is torch.float32
    with mixed.arithmetic():
        assert module(torch.ones(1, 2)).dtype is torch.bfloat16
    with choose(TrainSection(precision="fp32"), cpu).arithmetic():
        assert module(torch.ones(1, 2)).dtype is torch.float32


# ------------------------------------------------------------------------------------------------ batches

SIZES = st.lists(st.integers(1, 900), min_size=1, max_size=60)


def all_steps(count, section, **words):
    return list(batches.steps(count, section, **words))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_every_epoch_sees_every_row_once(count, batch_size, seed):
    section = TrainSection(batch_size=batch_size, seed=seed)
    per_epoch = section.steps_per_epoch(count)
    found = all_steps(count, section, last=2 * per_epoch)
    for epoch in range(2):
        steps = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for step in steps for i in step.rows) == list(range(count))
        assert all(1 <= len(step.rows) <= batch_size for step in steps)
    assert [step.number for step in found] == list(range(1, 2 * per_epoch + 1))
    assert found[per_epoch - 1].epoch == 1.0


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 40))
def test_going_on_from_a_step_gives_the_steps_that_were_left(count, batch_size, first):
    section = TrainSection(batch_size=batch_size)
    whole = all_steps(count, section, last=40)
    assert all_steps(count, section, first=first, last=40) == whole[first - 1 :]


def test_epochs_and_seeds_have_orders_of_their_own():
    section = TrainSection(batch_size=50)
    one, two = all_steps(50, section, last=2)
    assert all_steps(50, section, last=2) == [one, two]
    orders = [
        [i for step in all_steps(50, TrainSection(batch_size=1, seed=seed), last=100) for i in step.rows]
        for seed in (0, 1)
    ]
    assert len({tuple(order[start : start + 50]) for order in orders for start in (0, 50)}) == 4


@settings(deadline=None)
@given(SIZES, st.integers(16, 3000))
def test_a_padded_cut_keeps_within_its_tokens(sizes, most):
    groups = cutting.by_length(sizes, most)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        padded = len(group) * max(sizes[i] for i in group)
        assert padded <= most or len(group) == 1


@settings(deadline=None)
@given(SIZES)
def test_a_large_padded_cut_is_not_mostly_padding(sizes):
    for group in cutting.by_length(sizes, 100_000):
        real, longest = sum(sizes[i] for i in group), max(sizes[i] for i in group)
        # Whatever joined after enough real tokens were there kept the padding low.
        joined = [i for n, i in enumerate(group) if sum(sizes[j] for j in group[:n]) >= cutting.SMALLEST_CUT_TOKENS]
        if joined:
            assert 1 - real / (len(group) * longest) <= cutting.MOST_PADDING + 1e-9


@settings(deadline=None)
@given(SIZES, st.integers(16, 3000))
def test_a_best_fit_keeps_within_its_tokens_and_wastes_little(sizes, most):
    groups = cutting.best_fit(sizes, most)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in group) for group in groups]
    assert all(total <= most or len(group) == 1 for total, group in zip(totals, groups, strict=True))
    # Before they are made even, no two packs would fit into one; and that makes no more of them.
    plain = cutting._best_fit(sizes, most)
    filled = [sum(sizes[i] for i in group) for group in plain]
    assert all(a + b > most for n, a in enumerate(filled) for b in filled[n + 1 :])
    assert len(groups) == len(plain)
    assert len(groups) == 1 or sum(totals) > most * len(groups) / 2


def test_packs_are_filled_evenly_and_none_is_a_small_rest():
    alike = cutting.best_fit([10] * 8, 50)
    assert [len(group) for group in alike] == [4, 4]
    unlike = cutting.best_fit([30, 20, 20, 10, 10, 10], 70)
    assert [sum([30, 20, 20, 10, 10, 10][i] for i in group) for group in unlike] == [50, 50]
    ids = [[*range(20), *([100 + place] * 10)] for place in range(8)]
    together = cutting.by_beginning(ids, [len(row) - 2 for row in ids], 80)
    assert [len(group) for group in together] == [4, 4]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(2, 90)), min_size=1, max_size=40), st.integers(60, 600))
def test_rows_that_begin_alike_are_cut_together_and_keep_within_the_tokens(rows, most):
    beginnings = [[], list(range(20)), list(range(20)) + [7] * 30, [5] * 40]
    ids = [beginnings[kind] + [100 + place] * own for place, (kind, own) in enumerate(rows)]
    shareable = [len(row) - 2 for row in ids]
    groups = cutting.by_beginning(ids, shareable, most)
    assert sorted(i for group in groups for i in group) == list(range(len(ids)))
    for group in groups:
        packed = lean.lay([ids[i] for i in group], [shareable[i] for i in group])
        assert packed.pack.tokens <= max(most, *(len(ids[i]) for i in group))


def test_nothing_is_cut_into_nothing():
    assert cutting.by_length([], 100) == cutting.best_fit([], 100) == cutting.by_beginning([], [], 100) == ()


# ------------------------------------------------------------------------------------------------ too little memory


class Narrow:
    """A task on a machine that holds so many tokens at once and no more; the error comes halfway through the backward."""

    def __init__(self, task, most, error):
        self._task, self._most, self._error, self.read_at_once = task, most, error, []

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, module, batch):
        found = self._task.loss(module, batch)
        self.read_at_once.append(batch["input_ids"].numel())
        if self.read_at_once[-1] > self._most:
            found.total_B.sum().backward()  # gradients of the failed attempt must not stay
            raise self._error
        return found


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce] DefaultCPUAllocator: can't")],
)
def test_out_of_memory_cuts_the_step_smaller_and_changes_no_gradient(base, tmp_path, capsys, error):
    section = TrainSection(batch_size=8, max_steps=3, evaluations=1, micro_batch_tokens=4096)
    calm, narrow = fresh(base), fresh(base)
    roomy = SimpleNamespace(**vars(base))
    roomy.task = base.task.suited(calm)
    train(roomy, calm, Places(tmp_path / "a.jsonl", tmp_path / "a", keep=1, minutes=60.0), section)
    tight = SimpleNamespace(**vars(base))
    tight.task = Narrow(base.task.suited(narrow), 150, error)
    train(tight, narrow, Places(tmp_path / "b.jsonl", tmp_path / "b", keep=1, minutes=60.0), section)
    for name, tensor in weights(calm).items():
        torch.testing.assert_close(weights(narrow)[name], tensor, rtol=1e-4, atol=2e-5)
    told = capsys.readouterr().err
    assert 1 <= told.count("out of memory at") <= 3
    assert "with the same gradient" in told
    # Later steps begin with what fitted.
    assert max(tight.task.read_at_once[-3:]) <= 150


def test_a_row_that_does_not_fit_alone_is_named(base, places):
    tight = SimpleNamespace(**vars(base))
    module = fresh(base)
    tight.task = Narrow(base.task.suited(module), 1, MemoryError())
    before = weights(module)
    with pytest.raises(RecipeError, match=r"a row of \d+ tokens does not fit in memory, even alone") as caught:
        train(tight, module, places, validate=lambda: 1.0)
    assert "task.max_tokens" in str(caught.value)
    assert same_bits(before, weights(module))


def test_another_error_is_not_taken_for_a_lack_of_memory(base, places):
    tight = SimpleNamespace(**vars(base))
    module = fresh(base)
    tight.task = Narrow(base.task.suited(module), 1, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tight, module, places, validate=lambda: 1.0)


def test_a_step_of_which_nothing_is_learnt_stops_the_run(base, places):
    silent = [replace(row, learnt=torch.zeros_like(row.learnt)) for row in base.examples]
    module = fresh(base)
    mute = SimpleNamespace(**vars(base) | {"examples": silent, "task": base.task.suited(module)})
    before = weights(module)
    with pytest.raises(DataError, match="no token of these rows is learnt"):
        train(mute, module, places, validate=lambda: 1.0)
    assert same_bits(before, weights(module))


# ------------------------------------------------------------------------------------------------ checkpoints


def learner(base, method=LORA, seed=1):
    """A network with an optimizer and a schedule that have seen a few gradients."""
    module = fresh(base, method)
    optimizer = build_optimizer(AdamW(), module, learning_rate=0.01, adapters=True)
    schedule = build_schedule(Cosine(), optimizer, total_steps=20, steps_per_epoch=5)
    torch.manual_seed(seed)
    for _ in range(2):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        schedule.step()
    return SimpleNamespace(module=module, optimizer=optimizer, schedule=schedule)


ORIGIN = Origin({"the base": "a", "the rows": "12 rows"}, {"threads": 1})


def commit(folder, made, step, keep=3, **words):
    progress = Progress(step=step, **words)
    if math.isfinite(progress.best_loss):
        best = checkpoint.take_weights(made.module, copied=False)
        checkpoint.commit_best(folder, progress.best_step, best)
    contents = checkpoint.take(made.module, made.optimizer, made.schedule, progress, ORIGIN, copied=True)
    checkpoint.commit(folder, progress, contents, keep=keep)


def restore(folder, made, origin=None):
    return checkpoint.load_newest(folder, made.module, made.optimizer, made.schedule, origin or ORIGIN)


def moments(optimizer):
    state = optimizer.state_dict()
    return [
        (key, name, torch.as_tensor(value))
        for key, entry in sorted(state["state"].items())
        for name, value in sorted(entry.items())
    ]


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
def test_a_checkpoint_comes_back_bit_by_bit(base, tmp_path, method):
    made, other = learner(base, method), learner(base, method, seed=2)
    torch.manual_seed(77)
    random.seed(77)
    np.random.seed(77)  # noqa: NPY002 - the state that libraries below us read
    progress = {
        "best_step": 1,
        "best_loss": 0.1 + 0.2,
        "stale": 3,
        "seconds": 1.5,
        "tokens": 12345,
        "first_loss": 1 / 3,
    }
    commit(tmp_path, made, 2, **progress)

    def thrown():
        return torch.rand(3).tolist(), random.random(), np.random.normal(size=3).tolist()  # noqa: NPY002

    chance = thrown()
    assert not same_bits(weights(made.module), weights(other.module))
    assert restore(tmp_path, other) == Progress(step=2, **progress)
    assert thrown() == chance
    assert same_bits(weights(made.module), weights(other.module))
    assert other.schedule.state_dict() == made.schedule.state_dict()
    for (key, name, tensor), (key_2, name_2, tensor_2) in zip(
        moments(made.optimizer), moments(other.optimizer), strict=True
    ):
        assert (key, name) == (key_2, name_2)
        assert torch.equal(tensor, tensor_2)
    # The next step is the same as well.
    for both in (made, other):
        for group in both.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        both.optimizer.step()
    assert same_bits(weights(made.module), weights(other.module))


def test_a_best_loss_of_infinity_survives(base, tmp_path):
    made = learner(base)
    commit(tmp_path, made, 1)
    assert restore(tmp_path, made).best_loss == math.inf
    assert "Infinity" not in (tmp_path / "step-00000001" / checkpoint.STATE).read_text()


def test_no_checkpoint_is_none(base, tmp_path):
    made = learner(base)
    before = weights(made.module)
    assert restore(tmp_path / "nowhere", made) is None
    assert same_bits(before, weights(made.module))


def test_the_newest_are_kept(base, tmp_path):
    made = learner(base)
    (tmp_path / "other.safetensors").write_text("not ours")
    for step in (8, 9, 10, 11):
        commit(tmp_path, made, step, keep=2)
    assert names(tmp_path) == ["other.safetensors", "step-00000010", "step-00000011"]
    commit(tmp_path, made, 11, keep=1)
    assert restore(tmp_path, made).step == 11
    assert names(tmp_path) == ["other.safetensors", "step-00000011"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_best_weights_stay_while_a_checkpoint_refers_to_them(base, tmp_path):
    made = learner(base)
    commit(tmp_path, made, 4, keep=2, best_step=4, best_loss=3.0)
    commit(tmp_path, made, 8, keep=2, best_step=8, best_loss=2.0)
    assert names(tmp_path) == ["best-00000004", "best-00000008", "step-00000004", "step-00000008"]
    commit(tmp_path, made, 12, keep=2, best_step=8, best_loss=2.0)
    assert names(tmp_path) == ["best-00000008", "step-00000008", "step-00000012"]


def test_damaged_best_weights_make_the_checkpoints_that_need_them_unusable(base, tmp_path, capsys):
    made = learner(base)
    commit(tmp_path, made, 4, keep=2, best_step=4, best_loss=3.0)
    commit(tmp_path, made, 8, keep=2, best_step=8, best_loss=2.0)
    flip(tmp_path / "best-00000008" / checkpoint.WEIGHTS)
    assert restore(tmp_path, made).step == 4
    assert "best-00000008, are damaged" in capsys.readouterr().err


def test_a_damaged_newest_never_costs_an_older_one_its_place(base, tmp_path):
    """The next save after a fallback may come at an earlier step than the damaged one has."""
    made = learner(base)
    for step in (5, 10):
        commit(tmp_path, made, step)
    flip(tmp_path / "step-00000010" / checkpoint.WEIGHTS)
    assert restore(tmp_path, made).step == 5
    commit(tmp_path, made, 6, keep=1)
    assert names(tmp_path) == ["step-00000006"]


@pytest.mark.parametrize("word", ["the base", "the rows"])
def test_another_origin_is_refused_with_the_difference(base, tmp_path, word):
    made = learner(base)
    commit(tmp_path / "checkpoints", made, 1)
    before = weights(made.module)
    other = replace(ORIGIN, bound={**ORIGIN.bound, word: "another"})
    for refuse in (
        lambda: restore(tmp_path / "checkpoints", made, other),
        lambda: checkpoint.check_origin(tmp_path / "checkpoints", other),
    ):
        with pytest.raises(RecipeError, match=f"{word}: {ORIGIN.bound[word]} -> another") as caught:
            refuse()
        assert caught.value.exit_code == 2
    assert same_bits(before, weights(made.module))


def test_other_conditions_are_told(base, tmp_path, capsys):
    made = learner(base)
    commit(tmp_path, made, 1)
    assert restore(tmp_path, made, replace(ORIGIN, noted={"threads": 2})).step == 1
    assert "may change the last bits: threads: 1 -> 2" in capsys.readouterr().err


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": lambda path: path.unlink(),
}
FILES = (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE, commits.MANIFEST)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over(base, tmp_path, capsys, name, damage):
    made = learner(base)
    commit(tmp_path, made, 1)
    before = weights(made.module)
    other = learner(base, seed=2)
    commit(tmp_path, other, 2)
    DAMAGE[damage](tmp_path / "step-00000002" / name)
    assert restore(tmp_path, other).step == 1
    assert same_bits(before, weights(other.module))
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (warning,) = [line["text"] for line in said if line["event"] == "warning"]
    assert "step-00000002" in warning
    assert "passed over" in warning


def test_every_bit_of_a_manifest_counts(base, tmp_path):
    commit(tmp_path, learner(base), 1)
    manifest = tmp_path / "step-00000001" / commits.MANIFEST
    whole = manifest.read_bytes()
    assert checkpoint.find_damage(manifest.parent) is None
    for place in range(len(whole)):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if whole[place : place + 1].isspace():
            continue
        assert checkpoint.find_damage(manifest.parent), (
            f"byte {place}: {manifest.read_bytes()[place - 9 : place + 9]!r}"
        )


@pytest.mark.parametrize("text", ['{"files": {}}', "[]", '{"files": []}', '{"files": {"state.json": 3}}', "null"])
def test_a_manifest_that_proves_nothing_is_no_manifest(base, tmp_path, text):
    commit(tmp_path, learner(base), 1)
    (tmp_path / "step-00000001" / commits.MANIFEST).write_text(text)
    assert checkpoint.find_damage(tmp_path / "step-00000001")


def test_where_all_are_damaged_there_is_none(base, tmp_path, capsys):
    made = learner(base)
    for step in (1, 2):
        commit(tmp_path, made, step)
        flip(tmp_path / f"step-{step:08d}" / checkpoint.WEIGHTS)
    before = weights(made.module)
    assert restore(tmp_path, made) is None
    assert same_bits(before, weights(made.module))
    assert capsys.readouterr().err.count("passed over") == 2


def test_a_save_that_was_cut_off_is_no_checkpoint(base, tmp_path):
    made = learner(base)
    commit(tmp_path, made, 1)
    for name in (".staged-step-00000002-7-0", ".removed-step-00000000-7-1"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    (tmp_path / ".staged-state.json-7-2").write_text("{")
    assert restore(tmp_path, made).step == 1
    assert files.clean(tmp_path) == 3
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("limit", [10, 9000, 20_000])
def test_a_full_disk_leaves_the_older_checkpoint(base, tmp_path, limit):
    made = learner(base)
    commit(tmp_path, made, 1)
    sizes = [(tmp_path / "step-00000001" / name).stat().st_size for name in FILES[:2]]
    assert max(sizes) > 20_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageError) as caught:
            commit(tmp_path, made, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 74
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert restore(tmp_path, made).step == 1


def test_buffers_are_kept_with_the_weights(tmp_path):
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[0].requires_grad_(requires_grad=False)
    assert set(checkpoint.moving_weights(module)) == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    module(torch.randn(8, 2))
    checkpoint.commit_best(tmp_path, 3, checkpoint.take_weights(module, copied=True))
    other = copy.deepcopy(module)
    other(torch.randn(8, 2))
    checkpoint.load_best(tmp_path, 3, other)
    assert same_bits(weights(module), weights(other))


# ------------------------------------------------------------------------------------------------ a whole course


def test_a_course_learns_and_ends_with_its_best_weights(base, places):
    module = fresh(base)
    outcome = train(base, module, places)
    assert (outcome.steps, outcome.stopped_early) == (12, False)
    assert outcome.best_loss < 0.9 * outcome.first_loss
    assert held_out(base, module) == outcome.best_loss
    assert outcome.tokens_per_second > 0
    steps = lines(places, "step")
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[2]["epoch"] == 1.0
    assert sum(line["tokens"] for line in steps) == 4 * sum(base.task.size(example) for example in base.examples)
    assert [line["step"] for line in lines(places, "validation")] == [0, 3, 6, 9, 12]
    assert outcome.first_loss == lines(places, "validation")[0]["loss"]


def test_two_courses_have_the_same_bits_and_another_seed_others(base, tmp_path):
    found = []
    for n, seed in enumerate((5, 5, 6)):
        module = fresh(base, LORA)
        here = Places(tmp_path / f"{n}.jsonl", tmp_path / str(n), keep=1, minutes=60.0)
        train(base, module, here, SHORT.model_copy(update={"seed": seed}), method=LORA)
        found.append(weights(module))
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def signalled(base, module, at, number=signal.SIGTERM):
    """Validation that is struck by a signal the `at`-th time."""
    calls = []

    def validate():
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return held_out(base, module)

    return validate


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("at", "number", "step"),
    [(2, signal.SIGINT, 3), (3, signal.SIGTERM, 6), (5, signal.SIGTERM, 12)],
)
def test_a_course_that_was_stopped_goes_on_to_the_same_bits(base, tmp_path, places, method, at, number, step):
    whole = fresh(base, method)
    wanted = train(base, whole, Places(tmp_path / "w.jsonl", tmp_path / "w", keep=1, minutes=60.0), method=method)
    before = signal.getsignal(number)
    module = fresh(base, method)
    with pytest.raises(InterruptedRunError, match=f"stopped after step {step} of 12") as caught:
        train(base, module, places, method=method, validate=signalled(base, module, at, number))
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is before
    assert (places.checkpoints / f"step-{step:08d}").is_dir()
    # A new process: nothing but the files is left.
    module = fresh(base, method)
    torch.manual_seed(123)
    random.seed(123)
    found = train(base, module, places, method=method)
    assert same_bits(weights(whole), weights(module))
    assert (found.steps, found.best_step, found.best_loss, found.first_loss) == (
        wanted.steps, wanted.best_step, wanted.best_loss, wanted.first_loss,
    )  # fmt: skip
    assert without_clock(read_metrics(places.metrics)) == without_clock(read_metrics(tmp_path / "w.jsonl"))


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
def test_a_course_that_crashed_goes_on_from_its_last_checkpoint(base, tmp_path, places, method):
    whole = fresh(base, method)
    train(base, whole, Places(tmp_path / "w.jsonl", tmp_path / "w", keep=1, minutes=60.0), method=method)
    always = Places(places.metrics, places.checkpoints, keep=2, minutes=0.0)
    module = fresh(base, method)
    calls = []

    def crash():
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return held_out(base, module)

    with pytest.raises(MemoryError):
        train(base, module, always, method=method, validate=crash)
    # Steps 7 and 8 were saved, step 9 was not; the newer of the two is damaged by the crash.
    assert sorted(path.name for path in places.checkpoints.glob("step-*")) == ["step-00000007", "step-00000008"]
    flip(places.checkpoints / "step-00000008" / checkpoint.OPTIMIZER)
    module = fresh(base, method)
    train(base, module, always, method=method)
    assert same_bits(weights(whole), weights(module))
    assert without_clock(read_metrics(places.metrics)) == without_clock(read_metrics(tmp_path / "w.jsonl"))


PROGRAM = """
import sys, pathlib
sys.path[:0] = [{tests!r}, {here!r}]
import test_training as t, torch
from types import SimpleNamespace
from metier import models
model = models.load(t.ModelSection(base={folder!r}), head="causal")
task = t.build(t.ChatTask(), model.tokenizer, head="causal", labels=(), context=t.tiny.CONTEXT, seed=0)
examples = task.encode(t.ROWS, training=True)
base = SimpleNamespace(model=model, task=task, examples=examples[:-2], held=examples[-2:])
module = t.fresh(base, t.LORA)
root = pathlib.Path({root!r})
class Slow:
    def __getattr__(self, name):
        return getattr(task, name)
    def collate(self, rows):
        print("collating", flush=True)
        sys.stdin.readline()
        return task.collate(rows)
slow = SimpleNamespace(task=Slow(), examples=base.examples)
places = t.Places(root / "m.jsonl", root / "c", keep=1, minutes=60.0)
t.train(slow, module, places, method=t.LORA, validate=lambda: t.held_out(base, module))
"""


def test_a_second_signal_ends_the_process_at_once(base, tmp_path):
    here = Path(__file__).parent
    program = PROGRAM.format(tests=str(here.parent), here=str(here), folder=str(base.folder), root=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout.readline() == "collating\n"
    process.send_signal(signal.SIGTERM)
    for line in process.stderr:
        if "finishing this step" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in said
    assert not list(tmp_path.glob("c/step-*"))


def test_a_course_outside_the_main_thread_leaves_signals_alone(base, places):
    from concurrent.futures import ThreadPoolExecutor

    before = signal.getsignal(signal.SIGTERM)
    section = TrainSection(max_steps=1, evaluations=1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, base, fresh(base), places, section).result().steps == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_patience_ends_a_course_at_its_best(base, places):
    module = fresh(base)
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.0, 2.0])
    seen = []

    def validate():
        seen.append(weights(module))
        return next(losses)

    section = SHORT.model_copy(update={"patience": 2, "evaluations": 12})
    outcome = train(base, module, places, section, validate=validate)
    # 3.0 a second time is not better, so two evaluations in a row were in vain.
    assert (outcome.steps, outcome.best_step, outcome.best_loss, outcome.first_loss) == (4, 2, 3.0, 5.0)
    assert outcome.stopped_early
    assert same_bits(weights(module), seen[2])
    assert not same_bits(weights(module), seen[4])
    assert [line["best"] for line in lines(places, "validation")] == [False, True, True, False, False]


def test_without_patience_the_best_weights_come_back_after_the_last_step(base, places):
    module = fresh(base, LORA)
    losses = iter([5.0, 1.0, 2.0, 3.0, 4.0])
    seen = []

    def validate():
        seen.append(weights(module))
        return next(losses)

    outcome = train(base, module, places, method=LORA, validate=validate)
    assert (outcome.steps, outcome.best_step, outcome.stopped_early) == (12, 3, False)
    assert same_bits(weights(module), seen[1])


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_broken_weight_stops_the_course_with_the_weights_untouched(base, places):
    module = fresh(base)
    with torch.no_grad():
        module.lm_head.weight[3, 3] = math.inf
    before = weights(module)
    with pytest.raises(DivergedError, match=r"loss nan|gradient norm nan|loss inf") as caught:
        train(base, module, places)
    assert caught.value.exit_code == 70
    assert "the weights are unchanged" in str(caught.value)
    assert "train.learning_rate" in caught.value.faults[0].hint
    assert same_bits(before, weights(module))
    assert not lines(places, "step")


def test_a_rate_that_blows_up_stops_the_course(base, places):
    module = fresh(base)
    with pytest.raises(DivergedError, match="before the optimizer step"):
        train(base, module, places, rate=1e30)
    assert len(lines(places, "step")) < 12


def test_a_course_without_any_finite_validation_has_diverged(base, places):
    section = TrainSection(max_steps=2, epochs=9, batch_size=4, evaluations=1)
    with pytest.raises(DivergedError, match="no validation loss was a number"):
        train(base, fresh(base), places, section, validate=lambda: math.nan)


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(base, places, monkeypatch):
    module = fresh(base)
    before = weights(module)
    needed = 3 * checkpoint.estimated_bytes(module) + 2 * checkpoint.weights_bytes(module)
    usage = shutil.disk_usage(places.checkpoints.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(StorageError, match="more than is free") as caught:
        train(base, module, places)
    assert "export.folder" in caught.value.faults[0].hint
    assert same_bits(before, weights(module))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert train(base, module, places, TrainSection(max_steps=1, evaluations=1)).steps == 1


def test_the_estimate_of_a_checkpoint_is_near_its_size(base, tmp_path):
    made = learner(base, FULL)
    commit(tmp_path, made, 1)
    size = sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    assert checkpoint.estimated_bytes(made.module) == pytest.approx(size, rel=0.25)


def test_a_log_that_cannot_be_written_is_a_storage_error(base, places, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        train(base, fresh(base), Places(tmp_path / "file" / "m.jsonl", places.checkpoints, keep=1, minutes=60.0))


def test_a_log_is_read_up_to_the_line_a_crash_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "step": 2}\n{"kind": "st')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    log = metrics.MetricsLog(path)
    log.cut(1)
    assert path.read_text() == '{"kind": "step", "step": 1}\n'
    log.cut(None)
    assert path.read_text() == ""


def test_clipping_shortens_the_step_but_not_the_norm_that_is_told(base, tmp_path):
    told = []
    for n, most in enumerate((1e-3, 1e9)):
        here = Places(tmp_path / f"{n}.jsonl", tmp_path / str(n), keep=1, minutes=60.0)
        module = fresh(base)
        train(base, module, here, TrainSection(max_steps=1, max_grad_norm=most, evaluations=1))
        told.append(lines(here, "step")[0]["grad_norm"])
    assert told[0] == told[1] > 1e-3
