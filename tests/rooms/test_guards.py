"""Guards that work while a network trains: what each does to rows, loss and weights, and where it is refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import metier
from metier import adapt, models, run, tasks, training
from metier.core import Loss, RecipeError
from metier.recipe import LoRAMethod, ModelSection, parse
from metier.run.guards import learnt

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Message {i}: the order {i * 37} came {i % 9} days late"},
            {"role": "assistant", "content": f"team {i % 3}, number {i}"},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": f"in {i % 5} days"},
        ]
    }
    for i in range(48)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("guards")
    for name in ("llama", "bert", "t5"):
        tiny.make(name, root / name)
    tiny.teach(root / "llama")
    write(root / "chat.jsonl", ROWS)
    write(root / "class.jsonl", [{"text": f"message {i} came late", "label": "abc"[i % 3]} for i in range(48)])
    return root


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def job(place, name="llama", data="chat", task="chat", method="full", guards=None, **training_) -> dict:
    return {
        "model": {"base": str(place / name), "device": "cpu"},
        "data": {"train": str(place / f"{data}.jsonl"), "overlap": "allow"},
        "task": task,
        "method": method,
        "guards": guards or {},
        "train": {"max_steps": 12, "batch_size": 8, "evaluations": 1, "learning_rate": 0.01, **training_},
        "evaluate": {"generate": False, "rows": 6, "retention": "neutral-en"},
        "export": {"folder": str(place / "runs" / "-".join(map(str, (name, method, guards, training_))))},
    }


@pytest.fixture
def chat(place):
    """The taught network, the task suited to it, and rows."""
    prepared = run.prepare(parse(job(place)))
    model = prepared.load()
    return model, prepared.task.suited(model.module), prepared.train


def perplexities(module, row) -> list[float]:
    """Of each learnt token, by transformers' own scores."""
    with torch.no_grad():
        log_TV = F.log_softmax(module(input_ids=row.ids[None]).logits[0].double(), dim=-1)
    places = row.learnt.nonzero()[:, 0]
    return (-log_TV[places - 1, row.ids[places]]).exp().tolist()


class TestMasking:
    def test_what_the_base_finds_improbable_is_not_learnt_but_every_end_is(self, chat):
        model, task, rows = chat
        found = tasks.surprise(task, model.module, rows)
        threshold = found.perplexity(0.3)
        left = list(found.masked(threshold))
        lost = learnt = 0
        for row, narrowed in zip(rows, left, strict=True):
            assert torch.equal(row.ids, narrowed.ids)
            places = row.learnt.nonzero()[:, 0].tolist()
            for place, perplexity in zip(places, perplexities(model.module, row), strict=True):
                is_end = place + 1 == len(row.ids) or not row.learnt[place + 1]
                wanted = is_end or perplexity <= threshold
                if not math.isclose(perplexity, threshold, rel_tol=1e-3):
                    assert bool(narrowed.learnt[place]) == wanted
                assert narrowed.learnt[place] or not is_end
            lost, learnt = lost + len(places) - int(narrowed.learnt.sum()), learnt + len(places)
        assert found.share(threshold) == lost / learnt
        assert 0.25 < lost / learnt <= 0.3
        ends = [sum(bool(a) and not bool(b) for a, b in zip(row.learnt, row.learnt[1:], strict=False)) for row in rows]
        assert min(ends) == 2, "both replies of a conversation end in a learnt token"

    def test_the_base_is_asked_with_the_adapter_off(self, chat):
        model, task, rows = chat
        wrapped = adapt.adapt(copy.deepcopy(model.module), LoRAMethod(rank=4), head="causal").module
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()

        def nats(module):
            return tasks.surprise(task.suited(module), module, rows).nats.read(0, 10**6)

        wanted = nats(model.module)
        assert abs(nats(wrapped) - wanted).max() > 0.1
        with adapt.switched_off(wrapped):
            assert abs(nats(wrapped) - wanted).max() < 1e-4

    def test_of_too_many_the_refusal_tells_what_would_do(self, place):
        with pytest.raises(RecipeError, match=r"at most 40% may be left out") as refused:
            metier.train(job(place, guards={"mask_improbable": 1.01}))
        threshold = float(refused.value.faults[0].hint.split()[3])
        found = metier.train(job(place, guards={"mask_improbable": threshold})).evidence
        assert found.masked == pytest.approx(0.4, abs=0.03)
        assert found.masked <= 0.4
        assert any(note.startswith(f"{found.masked:.1%} of the learnt tokens are improbable") for note in found.notes)

    def test_what_is_left_out_is_learnt_less(self, place, chat):
        model, task, rows = chat
        threshold = tasks.surprise(task, model.module, rows).perplexity(0.35)
        losses = {}
        for guards in (None, {"mask_improbable": threshold}):
            run_ = metier.train(job(place, guards=guards, max_steps=40))
            tuned = metier.load(run_.path)
            nats = [tasks.surprise(tuned.task.suited(tuned.module), tuned.module, rows)]
            hard = tasks.surprise(task, model.module, rows).nats.read(0, 10**6) > math.log(threshold)
            losses[guards is None] = nats[0].nats.read(0, 10**6)[hard].mean()
        assert losses[False] > 1.2 * losses[True]


class TestDivergence:
    @pytest.mark.parametrize("method", ["full", "lora", "freeze"])
    def test_holds_the_network_close_to_the_base(self, place, method):
        moved = []
        for weight in (None, 3.0):
            found = metier.train(job(place, method=method, guards={"kl": weight} if weight else None)).evidence
            figures = {measure.name: measure for measure in found.measures}
            moved.append(figures["text_en"].change.value)
        assert moved[0] > 0.02
        assert moved[1] < 0.7 * moved[0]

    def test_is_in_the_training_loss_and_not_in_the_validation_loss(self, place):
        free, held = (metier.train(job(place, guards=guards, evaluations=2)) for guards in (None, {"kl": 3.0}))
        lines = [
            [json.loads(line) for line in (r.path / "metrics.jsonl").read_text().splitlines()] for r in (free, held)
        ]
        first = [next(line["loss"] for line in some if line["kind"] == "validation") for some in lines]
        assert first[0] == first[1]
        steps = [[line["loss"] for line in some if line["kind"] == "step"] for some in lines]
        assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-5)
        assert steps[0][-1] < steps[1][-1]

    def test_goes_with_masking(self, place):
        prepared = run.prepare(parse(job(place, guards={"kl": 0.5, "mask_improbable": 5000.0})))
        model = prepared.load()
        found = learnt(prepared, model.module)
        assert found.masked is not None
        for row in found.train[:5]:
            assert len(row.teacher.token_NK) == int(row.learnt.sum())


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x_BF):
        return self.head(torch.tanh(self.body(x_BF)))


class Fit:
    unit = "row"

    def loss(self, model, batch):
        off_B = (model(batch["x"]) - batch["y"]).square().sum(dim=1)
        return Loss(off_B, torch.ones_like(off_B))


class TestPull:
    @pytest.mark.parametrize("early", [False, True], ids=["after", "inside"])
    def test_a_step_has_the_gradient_of_loss_and_penalty(self, early):
        torch.manual_seed(1)
        batches = [{"x": torch.randn(n, 6), "y": torch.randn(n, 2)} for n in (3, 5)]
        module, began = Quadratic(), Quadratic()
        with torch.no_grad():  # as after some steps: the pull is towards where it began, not where it stands
            pull = training.Pull(module, 0.3, new=["head.weight", "head.bias"])
            for parameter in module.parameters():
                parameter.add_(0.2)
        plain = copy.deepcopy(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        pull.on(optimizer)
        precision = training.Precision("fp32", torch.device("cpu"))
        training.train_step(
            module, Fit(), batches, optimizer, precision=precision, max_grad_norm=None, during_backward=early
        )
        mean = sum(Fit().loss(plain, batch).total_B.sum() for batch in batches) / 8
        apart = sum(
            (a - b.detach()).square().sum()
            for a, b in zip(plain.body.parameters(), began.body.parameters(), strict=True)
        )
        (mean + 0.3 / 2 * apart).backward()
        for one, two in zip(module.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(one, two - 0.1 * two.grad, atol=1e-6)

    @pytest.mark.parametrize("method", ["full", "freeze"])
    def test_weights_stay_near_where_they_began_and_a_new_head_is_free(self, place, method):
        base = models.load(ModelSection(base=str(place / "bert")), head="classifier", labels=["a", "b", "c"])
        start = {name: p.detach().clone() for name, p in base.module.named_parameters()}
        found = {}
        for strength in (None, 30.0):
            guards = {"l2_sp": strength} if strength else None
            tuned = metier.load(
                metier.train(job(place, "bert", "class", "classify", method, guards, max_steps=30)).path
            )
            apart = {name: float((p.detach() - start[name]).norm()) for name, p in tuned.module.named_parameters()}
            found[strength] = (
                sum(value for name, value in apart.items() if name not in base.new),
                sum(value for name, value in apart.items() if name in base.new),
            )
        assert base.new
        assert found[30.0][0] < 0.5 * found[None][0]
        assert found[30.0][1] > 0.5 * found[None][1]

    def test_a_run_that_is_interrupted_is_pulled_to_the_base_and_not_to_the_checkpoint(self, place, monkeypatch):
        whole = job(place, method="full", guards={"l2_sp": 5.0}, max_steps=10, evaluations=2)
        whole["export"]["folder"] += "-whole"
        broken = copy.deepcopy(whole)
        broken["export"] |= {"folder": whole["export"]["folder"] + "-broken", "checkpoint_minutes": 1e-6}
        metier.train(whole)
        take = training.course.Course.after_step

        def stop(self, record):
            take(self, record)
            if record.step == 6:
                raise self.interrupted()

        monkeypatch.setattr(training.course.Course, "after_step", stop)
        with pytest.raises(metier.core.InterruptedRunError):
            metier.train(broken)
        monkeypatch.undo()
        metier.train(broken)
        one, two = (metier.load(tree["export"]["folder"]).module.state_dict() for tree in (whole, broken))
        assert all(torch.equal(one[name], two[name]) for name in one)


class TestRefusal:
    @pytest.mark.parametrize("guard", ["kl", "mask_improbable"])
    @pytest.mark.parametrize(("name", "data", "task"), [("t5", "chat", "chat"), ("bert", "class", "classify")])
    def test_what_asks_for_probabilities_of_tokens_needs_a_causal_model(self, place, guard, name, data, task):
        with pytest.raises(RecipeError, match="only a causal language model") as refused:
            run.prepare(parse(job(place, name, data, task, guards={guard: 2.0})))
        assert refused.value.faults[0].where == f"guards.{guard}"

    def test_an_adapter_has_nothing_to_be_pulled_to(self, place):
        with pytest.raises(RecipeError, match="an adapter begins at nothing"):
            run.prepare(parse(job(place, method="lora", guards={"l2_sp": 0.1})))

    @pytest.mark.parametrize("guards", [{"kl": 0}, {"l2_sp": -1}, {"mask_improbable": 1}, {"kI": 1}])
    def test_bad_values_are_faults_of_the_recipe(self, place, guards):
        with pytest.raises(RecipeError, match="guards"):
            parse(job(place, guards=guards))


def test_the_plan_counts_the_copy_that_weights_are_pulled_to(place):
    plans = [metier.plan(job(place, guards=guards)) for guards in (None, {"l2_sp": 0.1})]
    peaks = [{m.kind: m.memory.optimizer for m in plan.methods} for plan in plans]
    moved = plans[0].method("full").parameters_moved
    assert peaks[1]["full"] - peaks[0]["full"] == 4 * moved
    assert peaks[1]["lora"] == peaks[0]["lora"]
