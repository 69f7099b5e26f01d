"""Several runs on one base: each ends as if it had been alone, and the base keeps every bit."""

import copy
import gc
import math
import os
import signal
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from metier import models
from metier.adapt import Lanes, adapt, lean, merged, moving_weights
from metier.core import DivergedError, InterruptedRunError, RecipeError
from metier.core.rng import derive, seed_everything
from metier.data.records import Completion, Labelled
from metier.models.lean import Store
from metier.recipe import (
    ChatTask,
    ClassifyTask,
    CompleteTask,
    FreezeMethod,
    FullMethod,
    LoRAMethod,
    ModelSection,
    TrainSection,
)
from metier.tasks import build, mean_loss
from metier.training import Arm, Places, abreast, read_metrics, run
from metier.training.precision import Precision

CPU = Precision("fp32", torch.device("cpu"))
ROWS = tuple(
    Completion(f"a.jsonl:{i}", f"{sentence} {i}", f"answer {i % 3} to it" + " and more" * (i % 4))
    for i, sentence in enumerate(tiny.SENTENCES)
)
SHORT = TrainSection(epochs=2, batch_size=4, micro_batch_tokens=512, evaluations=3, seed=5)
"""Six steps over eleven rows."""
UPPER = LoRAMethod(rank=2, targets=("layers.1.mlp.down_proj",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def base(folder, tmp_path):
    """The tiny model in float64, so that the order of sums tells nothing, with rows for two tasks."""
    model = models.load(ModelSection(base=str(folder)), head="causal")
    model.module.double()
    words = {"head": "causal", "labels": (), "context": tiny.CONTEXT, "seed": 0}
    chat, complete = (build(section, model.tokenizer, **words) for section in (ChatTask(), CompleteTask()))
    chats, texts = chat.encode(ROWS, training=True), complete.encode(ROWS, training=True)
    return SimpleNamespace(
        model=model,
        chat=(chat, chats[:-2], chats[-2:]),
        complete=(complete, texts[:-3], texts[-3:]),
        folder=tmp_path,
    )


def arm(base, name, method, section=SHORT, *, rate=1e-2, lesson="chat", where="arms"):
    task, examples, validation = getattr(base, lesson)
    folder = base.folder / where / name
    places = Places(folder / "metrics.jsonl", folder / "checkpoints", keep=1, minutes=60.0)
    return Arm(name, method, section, rate, task, examples, validation, places)


def elsewhere(one):
    """The same arm in a folder of its own."""
    folder = one.places.checkpoints.parent.parent / "alone" / one.name
    return replace(
        one, places=replace(one.places, metrics=folder / "metrics.jsonl", checkpoints=folder / "checkpoints")
    )


def everything(module):
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return tensors, {name: p.requires_grad for name, p in module.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def told(one):
    clocks = ("seconds", "tokens_per_second", "memory_bytes")
    return [
        {key: value for key, value in line.items() if key not in clocks} for line in read_metrics(one.places.metrics)
    ]


def apart(one, other):
    """Largest difference between what moves in two networks, beside the largest value of each tensor."""
    one, other = moving_weights(one), moving_weights(other)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-9)) for name in one)


# ------------------------------------------------------------------------------------------------ one after the other


def test_arms_of_every_method_end_as_if_alone_and_the_base_keeps_every_bit(base):
    arms = [
        arm(base, "full", FullMethod(), rate=1e-3),
        arm(base, "freeze", FreezeMethod(blocks=1), rate=1e-3),
        arm(base, "upper", UPPER, SHORT.model_copy(update={"seed": 6})),
        arm(base, "lora", LoRAMethod(rank=4, dropout=0.1), SHORT.model_copy(update={"patience": 1})),
        arm(base, "other", LoRAMethod(rank=2), lesson="complete"),
    ]
    tensors, flags = everything(base.model.module)
    together = list(abreast(base.model, arms, precision=CPU))
    assert [trained.arm.name for trained in together] == [one.name for one in arms]
    for trained in together:
        (alone,) = abreast(base.model, [elsewhere(trained.arm)], precision=CPU)
        assert trained.outcome.best_loss == alone.outcome.best_loss < trained.outcome.first_loss
        found, wanted = (moving_weights(x.adapted.module) for x in (trained, alone))
        assert same(found, wanted)
        assert told(trained.arm) == told(alone.arm)
    found, kept = everything(base.model.module)
    assert same(found, tensors)
    assert kept == flags


@pytest.mark.parametrize("method", [FullMethod(), LoRAMethod(rank=2)], ids=["full", "lora"])
def test_an_arm_is_the_plain_run_bit_for_bit(base, method):
    one = arm(base, "one", method)
    (trained,) = abreast(base.model, [one], precision=CPU)
    seed_everything(derive(one.section.seed, "adapt"))
    module = adapt(base.model.module, method, head="causal", base_name="tiny").module
    task, other = one.task.suited(module), elsewhere(one)
    with lean(module):
        run(
            module,
            task,
            one.examples,
            one.section,
            learning_rate=one.learning_rate,
            adapters=isinstance(method, LoRAMethod),
            precision=CPU,
            validate=lambda: mean_loss(task, module, one.validation),
            places=other.places,
        )
    assert told(one) == told(other)
    assert same(moving_weights(trained.adapted.module), moving_weights(module))


def test_arms_share_the_base_and_what_is_computed_below_them(base, monkeypatch):
    served = []
    real = Store.keep
    monkeypatch.setattr(
        Store, "keep", lambda self, pack, states: (served.append(pack.tokens), real(self, pack, states))
    )
    arms = [arm(base, str(seed), UPPER, SHORT.model_copy(update={"seed": seed})) for seed in (1, 2)]
    trained = abreast(base.model, arms, precision=CPU)
    first = next(trained)
    rows = [*arms[0].examples, *arms[0].validation]
    assert served == [len(row.ids) for row in rows]  # each by itself, once
    second = next(trained)
    assert len(served) == len(rows)
    for one in (first, second):
        frozen = dict(one.adapted.module.get_base_model().named_parameters())
        assert frozen["model.embed_tokens.weight"].data_ptr() == base.model.module.model.embed_tokens.weight.data_ptr()
    assert not same(moving_weights(first.adapted.module), moving_weights(second.adapted.module))


def test_an_arm_that_is_let_go_leaves_its_memory_to_the_next(base):
    arms = [arm(base, str(seed), FullMethod(), SHORT.model_copy(update={"seed": seed})) for seed in (1, 2)]
    alive = []
    for trained in abreast(base.model, arms, precision=CPU):
        gc.collect()
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(trained.adapted.module))
        del trained


def test_merging_an_arm_leaves_the_base_as_it_is(base):
    tensors, _ = everything(base.model.module)
    (trained,) = abreast(base.model, [arm(base, "lora", LoRAMethod(rank=2))], precision=CPU)
    ids = base.chat[1][0].ids[None]
    with torch.no_grad():
        apart_ = trained.adapted.module.eval()(ids).logits
        whole = merged(trained.adapted.module).eval()(ids).logits
    torch.testing.assert_close(whole, apart_, rtol=1e-9, atol=1e-9)
    found, _ = everything(base.model.module)
    assert same(found, tensors)


# ------------------------------------------------------------------------------------------------ in one pass


def lanes(base, where="arms"):
    """Arms that differ in everything that may: rank, targets, rate, seed, task, batch, epochs, patience, clipping."""
    return [
        arm(base, "plain", LoRAMethod(rank=2), where=where),
        arm(base, "upper", UPPER, SHORT.model_copy(update={"seed": 7, "batch_size": 3}), rate=3e-2, where=where),
        arm(
            base,
            "other",
            LoRAMethod(rank=4, variant="rslora"),
            SHORT.model_copy(update={"epochs": 3.0, "max_grad_norm": 0.1}),
            lesson="complete",
            where=where,
        ),
        arm(base, "stalled", LoRAMethod(rank=3), SHORT.model_copy(update={"patience": 1}), rate=0.0, where=where),
    ]


def hold(trained, *, losses=1e-6, weights=1e-4):
    """Every arm is what it is alone, one after the other."""
    for one in trained:
        (alone,) = abreast(one_base[0], [elsewhere(one.arm)], precision=CPU, one_pass=False)
        for mine, theirs in zip(told(one.arm), told(alone.arm), strict=True):
            assert mine.pop("kind") == theirs.pop("kind")
            assert mine == pytest.approx(theirs, rel=losses, abs=losses)
        assert apart(one.adapted.module, alone.adapted.module) <= weights
        assert (one.outcome.steps, one.outcome.best_step, one.outcome.stopped_early) == (
            alone.outcome.steps,
            alone.outcome.best_step,
            alone.outcome.stopped_early,
        )


one_base = []
"""The base of the test that runs."""


@pytest.fixture(autouse=True)
def _base_of_the_test(base):
    one_base[:] = [base.model]


def test_arms_in_one_pass_end_as_each_does_alone(base):
    tensors, flags = everything(base.model.module)
    trained = list(abreast(base.model, lanes(base), precision=CPU, one_pass=True))
    assert [one.arm.name for one in trained] == ["plain", "upper", "other", "stalled"]
    assert trained[3].outcome.stopped_early
    assert trained[3].outcome.steps < trained[0].outcome.steps < trained[2].outcome.steps
    hold(trained)
    found, kept = everything(base.model.module)
    assert same(found, tensors)
    assert kept == flags


def test_an_arm_that_diverges_leaves_the_others_alone(base):
    arms = lanes(base)[:3]
    arms[1] = replace(arms[1], learning_rate=math.inf)
    first, broken, last = abreast(base.model, arms, precision=CPU, one_pass=True)
    assert isinstance(broken.outcome, DivergedError)
    hold([first, last])
    for one_pass in (True, False):
        again = [elsewhere(replace(one, name=f"{one.name} {one_pass}")) for one in arms[1:]]
        broken, last = abreast(base.model, again, precision=CPU, one_pass=one_pass)
        assert isinstance(broken.outcome, DivergedError)
        assert not isinstance(last.outcome, DivergedError)


def test_out_of_memory_cuts_the_passes_smaller_and_changes_no_gradient(base, capsys):
    read = []

    def narrow(layer, given):
        if layer.training:
            if given[0].shape[1] > 150:
                raise MemoryError
            read.append(given[0].shape[1])

    wanted = abreast(base.model, [elsewhere(one) for one in lanes(base)[:2]], precision=CPU, one_pass=True)
    wanted = [one.adapted.module for one in wanted]
    base.model.module.model.embed_tokens.register_forward_pre_hook(narrow)
    found = [one.adapted.module for one in abreast(base.model, lanes(base)[:2], precision=CPU, one_pass=True)]
    assert max(map(apart, found, wanted)) <= 1e-4
    assert "with the same gradient" in capsys.readouterr().err
    assert max(read) <= 150


def test_arms_that_are_interrupted_go_on_and_end_with_the_same_bits(base):
    wanted = [elsewhere(one) for one in lanes(base)[:3]]
    whole = list(abreast(base.model, wanted, precision=CPU, one_pass=True))
    passes = []

    def strike(layer, _):
        if layer.training:
            passes.append(1)
            if len(passes) == 4:
                os.kill(os.getpid(), signal.SIGINT)

    model = replace(base.model, module=copy.deepcopy(base.model.module))
    model.module.model.embed_tokens.register_forward_pre_hook(strike)
    arms = lanes(base)[:3]
    with pytest.raises(InterruptedRunError, match="everything up to here is saved"):
        list(abreast(model, arms, precision=CPU, one_pass=True))
    resumed = list(abreast(model, arms, precision=CPU, one_pass=True))
    for one, other in zip(resumed, whole, strict=True):
        assert same(moving_weights(one.adapted.module), moving_weights(other.adapted.module))
        assert told(one.arm) == told(other.arm)


def test_one_pass_that_is_impossible_is_refused_with_the_reason(base, tmp_path):
    def refused(model, arms, said):
        with pytest.raises(RecipeError, match=said) as caught:
            abreast(model, arms, precision=CPU, one_pass=True)
        assert "one after the other" in str(caught.value)

    lora = arm(base, "lora", LoRAMethod(rank=2))
    refused(base.model, [lora], "two arms and more")
    refused(base.model, [lora, arm(base, "full", FullMethod())], "full moves the base's own weights")
    refused(base.model, [lora, arm(base, "wet", LoRAMethod(rank=2, dropout=0.1))], "something is dropped .* of wet")
    refused(base.model, [lora, arm(base, "dora", LoRAMethod(rank=2, variant="dora"))], "more than a plain low-rank")
    t5 = models.load(ModelSection(base=str(tiny.make("t5", tmp_path / "t5"))), head="seq2seq")
    for part in t5.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    task = build(ChatTask(), t5.tokenizer, head="seq2seq", labels=(), context=tiny.CONTEXT, seed=0)
    rows = task.encode(ROWS, training=True)
    two = (lora, arm(base, "b", lora.method))
    pair = [replace(one, task=task, examples=rows, validation=rows) for one in two]
    refused(t5, pair, "not scored alike from packs")


def test_a_network_that_counts_otherwise_is_noticed_before_the_first_step(base, monkeypatch):
    arms = lanes(base)[:2]
    mix_up = Lanes.laid
    monkeypatch.setattr(Lanes, "laid", lambda self, numbers, *sizes: mix_up(self, numbers, [1] * len(numbers)))
    with pytest.raises(RecipeError, match=r"a layer that is given \d+ places"):
        abreast(base.model, arms, precision=CPU, one_pass=True)
    monkeypatch.undo()
    monkeypatch.setattr("metier.training.arms.score", lambda *_: SimpleNamespace(total_B=torch.tensor([1e3])))
    with pytest.raises(RecipeError, match="answers otherwise in one pass"):
        abreast(base.model, arms, precision=CPU, one_pass=True)


def test_arms_that_would_write_to_one_folder_are_refused(base):
    with pytest.raises(RecipeError, match="two of the arms same, same would write to one folder"):
        abreast(base.model, [arm(base, "same", UPPER), arm(base, "same", FullMethod())], precision=CPU)


def test_encoders_take_one_pass_where_nothing_is_dropped(tmp_path, base):
    labels = ("even", "odd")
    model = models.load(ModelSection(base=str(tiny.make("bert", tmp_path / "bert"))), head="classifier", labels=labels)
    model.module.double()
    for part in model.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.module.config.attention_probs_dropout_prob = model.module.config.hidden_dropout_prob = 0.0
    rows = [Labelled(f"r:{i}", text, labels[i % 2]) for i, text in enumerate(tiny.SENTENCES)]
    task = build(ClassifyTask(), model.tokenizer, head="classifier", labels=labels, context=tiny.CONTEXT, seed=0)
    examples = task.encode(rows, training=True)
    base.words = (task, examples[:-3], examples[-3:])
    arms = [arm(base, str(rank), LoRAMethod(rank=rank), lesson="words") for rank in (2, 5)]
    one_base[:] = [model]
    hold(list(abreast(model, arms, precision=CPU, one_pass=True)))
