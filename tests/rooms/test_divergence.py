"""A run that is being destroyed is stopped before the next step; one that is only noisy goes on to its end."""

import copy
import json
import math
import random
from statistics import median
from types import SimpleNamespace

import pytest
import tiny
import torch

from metier import models
from metier.adapt import adapt
from metier.core import DivergedError
from metier.data.records import Completion
from metier.recipe import ChatTask, FullMethod, LoRAMethod, ModelSection, TrainSection
from metier.tasks import build, score
from metier.training import Places, checkpoint, read_metrics, run
from metier.training.checkpoint import unsound
from metier.training.precision import Precision
from metier.training.watch import PATIENCE, WINDOW, Watch

CPU = Precision("fp32", torch.device("cpu"))
WORDS = ("refund", "billing", "delivery", "returns", "urgent", "order", "card")


def row(number, chance):
    """One in ten has an answer that looks like nothing else."""
    length = chance.randint(1, 8)
    answer = " ".join(chance.choice(WORDS) for _ in range(length))
    if chance.random() < 0.1:
        answer = "".join(chr(chance.randint(0x4E00, 0x4E80)) for _ in range(length))
    return Completion(f"a.jsonl:{number}", f"{chance.choice(tiny.SENTENCES[:4])} {number % 7}", answer)


def learn(base, module, places, section, rate, examples=None, validate=None):
    task = base.task.suited(module)

    def held_out():
        loss = score(task, module, base.held)
        return float(loss.total_B.sum() / loss.weight_B.sum())

    return run(
        module,
        task,
        base.examples if examples is None else examples,
        section,
        learning_rate=rate,
        adapters=False,
        precision=CPU,
        validate=validate or held_out,
        places=places,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small network that has learnt these rows a little, as a pretrained one has learnt its language."""
    folder = tmp_path_factory.mktemp("base")
    model = models.load(ModelSection(base=str(tiny.make("llama", folder / "llama"))), head="causal")
    task = build(ChatTask(), model.tokenizer, head="causal", labels=(), context=tiny.CONTEXT, seed=0)
    chance = random.Random(3)
    examples = task.encode([row(number, chance) for number in range(150)], training=True)
    found = SimpleNamespace(model=model, task=task, held=examples[:30], examples=examples[30:])
    section = TrainSection(max_steps=80, epochs=99, batch_size=16, evaluations=1)
    learn(found, model.module, places_in(folder), section, 1e-2)
    return found


def places_in(folder):
    return Places(metrics=folder / "metrics.jsonl", checkpoints=folder / "checkpoints", keep=2, minutes=60.0)


def fresh(base, method="full"):
    torch.manual_seed(9)
    chosen = FullMethod() if method == "full" else LoRAMethod(rank=2)
    return adapt(copy.deepcopy(base.model.module), chosen, head="causal", base_name="tiny").module


def weights(module):
    return {name: tensor.clone() for name, tensor in checkpoint.moving_weights(module).items()}


def steps(places):
    return [line for line in read_metrics(places.metrics) if line["kind"] == "step"]


class TestRealRuns:
    @pytest.mark.parametrize("method", ["full", "lora"])
    @pytest.mark.parametrize("rate", [1.0, 30.0])
    def test_an_exploding_rate_is_stopped_before_the_step_after(self, base, tmp_path, method, rate):
        places, module = places_in(tmp_path), fresh(base, method)
        with pytest.raises(DivergedError) as caught:
            learn(base, module, places, TrainSection(max_steps=40, batch_size=8, evaluations=40), rate)
        taken = steps(places)
        assert len(taken) <= 4
        said = str(caught.value)
        assert f"step {len(taken) + 1} of 40, peak rate {rate:g}" in said
        assert f"begin anew with train.learning_rate={rate / 3:.2g}" in said
        assert "the weights are unchanged" in said
        assert caught.value.exit_code == 70
        # The rows of the step that was not taken are there, with what they score now.
        path = places.suspects / f"step-{len(taken) + 1:08d}.jsonl"
        assert str(path) in said
        kept = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert len(kept) == 8
        assert all(line["where"].startswith("a.jsonl:") and line["text"] for line in kept)
        finite = [line["loss"] for line in kept if line["loss"] is not None]
        assert finite == sorted(finite, reverse=True)
        # What was saved before can be used.
        assert not unsound_files(places)
        if taken:
            assert "the best weights stay in" in said

    @pytest.mark.parametrize("batch_size", [1, 4])
    @pytest.mark.parametrize("seed", range(4))
    def test_noise_stops_nothing(self, base, tmp_path, batch_size, seed):
        """Rows of which one in ten looks like nothing else, a few at a time."""
        places, module = places_in(tmp_path), fresh(base)
        section = TrainSection(max_steps=60, epochs=99, batch_size=batch_size, evaluations=1, seed=seed)
        assert learn(base, module, places, section, 2e-3).steps == 60
        losses = [line["loss"] for line in steps(places)]
        assert batch_size > 1 or max(losses) > 3 * median(losses)

    def test_rows_unlike_the_others_are_kept_and_the_run_goes_on(self, base, tmp_path, capsys):
        strange = base.task.encode([Completion("b.jsonl:7", "x", "犇猋骉麤鱻羴毳淼焱垚")], training=True)
        examples = [*[base.examples[i] for i in range(40)], strange[0]]
        places, module = places_in(tmp_path), fresh(base)
        section = TrainSection(epochs=1, batch_size=1, evaluations=1)
        assert learn(base, module, places, section, 1e-3, examples=examples).steps == 41
        warned = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "unlike the others" in line]
        assert 0 < len(warned) <= 3
        kept = [line for path in places.suspects.iterdir() for line in path.read_text("utf-8").splitlines()]
        assert len(kept) == len(warned)

    def test_a_row_with_an_infinite_loss_is_named(self, base, tmp_path):
        """An embedding that no other row uses is broken."""
        row_N = base.examples[5]
        own = {int(i) for i in row_N.ids} - {int(i) for e in [base.examples[j] for j in (0, 1, 2)] for i in e.ids}
        module = fresh(base)
        with torch.no_grad():
            module.model.embed_tokens.weight[min(own)] = math.nan
        examples = [base.examples[0], base.examples[1], row_N, base.examples[2]]
        before = weights(module)
        with pytest.raises(DivergedError) as caught:
            learn(
                base,
                module,
                places_in(tmp_path),
                TrainSection(max_steps=1, batch_size=4, evaluations=1),
                1e-3,
                examples=examples,
                validate=lambda: 1.0,
            )
        said = str(caught.value)
        assert f"where {row_N.where} have no finite loss - look at these rows first; nothing had been saved" in said
        after = weights(module)
        assert all(torch.equal(before[name], after[name]) or name == "model.embed_tokens.weight" for name in before)

    def test_at_the_first_step_the_rate_is_not_to_blame(self, base, tmp_path):
        module = fresh(base)
        with torch.no_grad():
            module.lm_head.weight[3, 3] = math.inf
        with pytest.raises(DivergedError, match="no weight has moved yet: look at the rows and at the base"):
            learn(base, module, places_in(tmp_path), TrainSection(max_steps=1), 1e-3, validate=lambda: 1.0)

    def test_nothing_that_is_not_finite_is_ever_saved(self, base, tmp_path):
        """A step of finite gradients can still end in infinite weights, and validation may not notice."""
        places, module = places_in(tmp_path), fresh(base)
        section = TrainSection(max_steps=3, batch_size=4, evaluations=3, max_grad_norm=None)
        with pytest.raises(DivergedError, match="is not finite after step 1"):
            learn(base, module, places, section, 1e40, validate=lambda: 1.0)
        assert not unsound_files(places)

    def test_a_resumed_run_knows_the_losses_before(self, base, tmp_path):
        places, module = places_in(tmp_path), fresh(base)
        learn(base, module, places, TrainSection(max_steps=6, batch_size=8, evaluations=1), 1e-3)
        before = [line["loss"] for line in steps(places)]
        watch = Watch(1.0, lambda _: 50.0, before=before)
        watch.check(before[-1], ())
        with pytest.raises(DivergedError, match=r"rows that had .* before the last step now have 50"):
            watch.check(40.0, ())


def unsound_files(places):
    """Saved files with numbers that are not finite."""
    from safetensors.torch import load_file

    files = list(places.checkpoints.rglob("*.safetensors")) if places.checkpoints.exists() else []
    return [file for file in files if not all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())]


class TestWatch:
    def sound(self, rows):
        return rows

    def test_long_tails_need_a_second_look_and_pass_it(self):
        """Losses drawn from a law with infinite variance, of a network that does not change."""
        for seed in range(20):
            chance = random.Random(seed)
            watch = Watch(2.0, self.sound)
            for _ in range(1000):
                loss = chance.paretovariate(1.5)
                watch.check(loss, loss)

    def test_a_network_that_lost_half_of_what_it_learnt_and_does_not_come_back(self):
        watch = Watch(6.0, self.sound)
        for step in range(WINDOW):
            watch.check(0.5 + 0.01 * (step % 5), 0.5)
        for _ in range(PATIENCE - 1):
            watch.check(5.0, 5.0)
            assert watch.spiked
        with pytest.raises(DivergedError, match=r"loss 5, where 0\.52 was usual, for 20 steps in a row"):
            watch.check(5.0, 5.0)

    def test_a_spike_that_recovers(self):
        watch = Watch(6.0, self.sound)
        for cycle in range(10):
            for step in range(30):
                watch.check(0.5 + 0.01 * (step % 5), 0.5)
            assert not watch.spiked
            for _ in range(PATIENCE - 1 - cycle):
                watch.check(5.0, 5.0)

    def test_what_is_close_to_zero_may_move_freely(self):
        """At the end of learning by heart, a loss a hundred times the median is still nothing."""
        watch = Watch(2.0, self.sound)
        for step in range(500):
            watch.check(0.9 if step % 50 == 49 else 0.001, 0.001)
            assert not watch.spiked

    def test_losses_below_zero_are_judged_by_their_spread(self):
        watch = Watch(-1.0, lambda rows: rows + 100.0)
        chance = random.Random(1)
        for _ in range(100):
            watch.check(-5 + chance.gauss(0, 0.1), -5.0)
        with pytest.raises(DivergedError):
            watch.check(80.0, -5.0)

    def test_where_the_start_is_unknown_nothing_counts_as_lost(self):
        watch = Watch(math.nan, self.sound)
        for loss in (1.0, 1.0, 50.0, 1.0, 900.0):
            watch.check(loss, loss)
            assert not watch.spiked

    def test_a_second_look_that_is_no_number_is_ruin(self):
        watch = Watch(1.0, lambda _: math.nan)
        watch.check(1.0, ())
        with pytest.raises(DivergedError, match="now have nan"):
            watch.check(9.0, ())


def test_every_tensor_that_is_saved_is_looked_at(base):
    module = fresh(base)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert unsound(module, optimizer) is None
    state = next(iter(optimizer.state.values()))
    state["exp_avg"][0] = math.inf
    assert unsound(module, optimizer) == "the optimizer's exp_avg"
    with torch.no_grad():
        module.model.norm.weight[0] = math.nan
    assert unsound(module, optimizer) == "model.norm.weight"
