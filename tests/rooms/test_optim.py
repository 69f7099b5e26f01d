"""How weights move: moments in 8 bits, steps inside the backward pass, bf16 weights rounded by chance."""

import copy
import math
import os
import shutil
import signal

import pytest
import tiny
import torch
from torch import nn

from metier import models
from metier.adapt import adapt, lean
from metier.core import DataError, DivergedError, InterruptedRunError, Loss, RecipeError
from metier.data.records import Completion, Labelled
from metier.planning.memory import NUMBERS
from metier.recipe import (
    Adam,
    AdamW,
    ChatTask,
    ClassifyTask,
    CompleteTask,
    FullMethod,
    LoRAMethod,
    ModelSection,
    TrainSection,
    parse,
)
from metier.tasks import build, score
from metier.training import (
    Places,
    Precision,
    build_optimizer,
    check_compiler,
    checkpoint,
    compiled,
    read_metrics,
    recomputing,
    run,
    train_step,
)
from metier.training.rounding import RoundedAdam, rounded

CPU = Precision("fp32", torch.device("cpu"))
BF16 = Precision("bf16", torch.device("cpu"))
ROWS = tuple(
    Completion(f"a.jsonl:{i}", f"{sentence} {i}", f"answer {i % 3} to it") for i, sentence in enumerate(tiny.SENTENCES)
)
EARLY = AdamW(during_backward=True)


class Base:
    """The tiny Llama, its task and its rows."""

    def __init__(self, folder):
        self.model = models.load(ModelSection(base=str(folder)), head="causal")
        self.task = build(ChatTask(), self.model.tokenizer, head="causal", labels=(), context=tiny.CONTEXT, seed=0)
        self.examples = self.task.encode(ROWS, training=True)

    def fresh(self, method=None, precision=CPU):
        torch.manual_seed(9)
        module = copy.deepcopy(self.model.module)
        module = adapt(module, method or FullMethod(), head="causal", base_name="tiny").module
        precision.place(module)
        return module

    def batches(self, *sizes):
        """Micro-batches of so many rows each."""
        begins = [sum(sizes[:n]) for n in range(len(sizes))]
        return [
            self.task.collate(self.examples[begin : begin + size]) for begin, size in zip(begins, sizes, strict=True)
        ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(tiny.make("llama", tmp_path_factory.mktemp("tiny") / "llama"))


def moved(base, section, cuts, *, method=None, steps=3, precision=CPU):
    """The network after a few steps, what each told, and its optimizer."""
    module = base.fresh(method, precision)
    optimizer = build_optimizer(section, module, learning_rate=1e-2, adapters=isinstance(method, LoRAMethod), seed=3)
    early = section.during_backward
    told = [
        train_step(
            module,
            base.task,
            iter(base.batches(*cuts)),
            optimizer,
            precision=precision,
            max_grad_norm=None,
            during_backward=early,
        )
        for _ in range(steps)
    ]
    return module, told, optimizer


def weights(module):
    return {name: tensor.clone() for name, tensor in checkpoint.moving_weights(module).items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def recipe(**train):
    return parse({"model": {"base": "m"}, "data": {"train": "a.jsonl"}, "task": {"kind": "chat"}, "train": train})


# ------------------------------------------------------------------------------------------------ what may be asked


class TestWhatMayBeAsked:
    def test_a_norm_that_nobody_knows_in_time_is_refused_with_what_to_write(self):
        with pytest.raises(RecipeError) as caught:
            recipe(optimizer={"during_backward": True})
        (fault,) = caught.value.faults
        assert "train.max_grad_norm is 1.0" in fault.what
        assert "set train.max_grad_norm to null" in fault.hint
        section = recipe(optimizer={"during_backward": True}, max_grad_norm=None).train
        assert section.optimizer == EARLY
        assert section.max_grad_norm is None

    def test_null_never_clips_and_the_usual_way_stays_as_it_was(self):
        assert recipe().train.max_grad_norm == 1.0
        assert not recipe().train.optimizer.during_backward
        assert recipe(max_grad_norm=None).train.max_grad_norm is None
        with pytest.raises(RecipeError, match="greater than 0"):
            recipe(max_grad_norm=0)

    def test_8_bit_states_do_not_go_with_bf16_weights(self):
        with pytest.raises(RecipeError, match=r"train\.precision is 'bf16'.*loses small updates"):
            recipe(optimizer={"states": "int8"}, precision="bf16")
        assert recipe(optimizer={"states": "int8"}, precision="mixed").train.optimizer.states == "int8"

    def test_8_bit_states_do_not_go_with_amsgrad(self):
        with pytest.raises(RecipeError, match="without amsgrad alone"):
            recipe(optimizer={"kind": "adam", "states": "int8", "amsgrad": True})
        assert recipe(optimizer={"kind": "adam", "states": "int8"}).train.optimizer.states == "int8"

    @pytest.mark.parametrize("section", [AdamW(states="int8"), Adam(states="int8")], ids=["adamw", "adam"])
    def test_8_bit_states_on_a_cpu_are_refused(self, section):
        with pytest.raises(RecipeError, match="need a CUDA device") as caught:
            build_optimizer(section, nn.Linear(2, 2), learning_rate=0.1, adapters=False)
        assert "fp32" in caught.value.faults[0].hint

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_8_bit_states_move_weights_nearly_as_32_bits_do(self):
        pytest.importorskip("bitsandbytes")
        found = []
        for section in (AdamW(), AdamW(states="int8")):
            torch.manual_seed(0)
            module = nn.Linear(128, 128).cuda()
            optimizer = build_optimizer(section, module, learning_rate=1e-3, adapters=False)
            start = module.weight.detach().clone()
            for _ in range(20):
                optimizer.zero_grad()
                module(torch.randn(16, 128, device="cuda")).square().sum().backward()
                optimizer.step()
            found.append(module.weight.detach() - start)
        assert (found[0] - found[1]).norm() < 0.1 * found[0].norm()


# ------------------------------------------------------------------------------------------------ inside the backward


class TestInsideTheBackwardPass:
    @pytest.mark.parametrize("method", [FullMethod(), LoRAMethod(rank=2)], ids=["full", "lora"])
    @pytest.mark.parametrize("kind", [AdamW(weight_decay=0.1), Adam(amsgrad=True)], ids=["adamw", "adam"])
    def test_one_pass_moves_the_weights_to_the_same_bits(self, base, method, kind):
        early = kind.model_copy(update={"during_backward": True})
        usual, told, _ = moved(base, kind, (4,), method=method)
        found, told_early, _ = moved(base, early, (4,), method=method)
        assert same_bits(weights(usual), weights(found))
        for wanted, said in zip(told, told_early, strict=True):
            assert said == pytest.approx(wanted, rel=1e-5)

    def test_several_passes_sum_their_gradients_and_step_in_the_last(self, base):
        usual, told, _ = moved(base, AdamW(), (3, 1, 2))
        found, told_early, _ = moved(base, EARLY, (3, 1, 2))
        assert same_bits(weights(usual), weights(found))
        assert [weight for *_, weight in told] == [weight for *_, weight in told_early]

    def test_gradients_are_gone_when_the_pass_ends_and_never_exist_together(self, base):
        module = base.fresh()
        optimizer = build_optimizer(EARLY, module, learning_rate=1e-3, adapters=False)
        most = []

        def count(_):
            most.append(sum(p.grad is not None for p in module.parameters()))

        hooks = [p.register_post_accumulate_grad_hook(count) for p in module.parameters()]
        step = {"precision": CPU, "max_grad_norm": None, "during_backward": True}
        train_step(module, base.task, base.batches(4), optimizer, **step)
        assert all(p.grad is None for p in module.parameters())
        assert len(most) == len(list(module.parameters()))
        # A fused operation may finish two or three at once; a whole network of gradients there never is.
        assert max(most) <= 3 < len(most)
        for hook in hooks:
            hook.remove()
        # Nothing of it stays behind: the usual way works afterwards.
        train_step(module, base.task, base.batches(4), optimizer, precision=CPU, max_grad_norm=1.0)
        assert all(p.grad is not None for p in module.parameters())

    def test_what_only_an_earlier_pass_reached_moves_as_well(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = nn.ParameterList([torch.ones(2), torch.ones(2)])

        class Task:
            unit = "value"

            def loss(self, module, batch):
                total = (module.experts[int(batch["expert"])] * batch["x"]).sum(-1, keepdim=True)
                return Loss(total, torch.ones(1))

        batches = [{"expert": torch.tensor(n), "x": torch.tensor([1.0, 2.0])} for n in (0, 1)]
        found = []
        for early in (False, True):
            module = Experts()
            optimizer = build_optimizer(AdamW(), module, learning_rate=0.1, adapters=False)
            facts = {"precision": CPU, "max_grad_norm": None, "during_backward": early}
            train_step(module, Task(), batches, optimizer, **facts)
            found.append(weights(module))
        assert same_bits(*found)
        assert not torch.equal(found[1]["experts.0"], torch.ones(2))

    def test_a_loss_that_is_no_number_leaves_the_weights_untouched(self, base):
        module = base.fresh()
        with torch.no_grad():
            module.lm_head.weight[3, 3] = math.inf
        before = weights(module)
        optimizer = build_optimizer(EARLY, module, learning_rate=1e-3, adapters=False)
        with pytest.raises(DivergedError, match="the weights are unchanged"):
            train_step(
                module,
                base.task,
                base.batches(2),
                optimizer,
                precision=CPU,
                max_grad_norm=None,
                during_backward=True,
            )
        assert same_bits(before, weights(module))

    def test_a_gradient_that_is_no_number_never_reaches_a_weight(self):
        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.below, self.above = (nn.Parameter(torch.tensor([x])) for x in (0.0, 2.0))

        class Task:
            unit = "value"

            def loss(self, module, batch):
                # The slope of a square root at zero is infinite, its value is not.
                return Loss(module.above + module.below.sqrt(), torch.ones(1))

        module = Root()
        optimizer = build_optimizer(AdamW(), module, learning_rate=0.1, adapters=False)
        with pytest.raises(DivergedError, match="inside the backward pass; parameters above it have moved"):
            train_step(module, Task(), [{}], optimizer, precision=CPU, max_grad_norm=None, during_backward=True)
        assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
        assert module.below == 0.0

    @pytest.mark.parametrize(("at", "what"), [(1, RuntimeError), (2, RecipeError)])
    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("no more"), RuntimeError("DefaultCPUAllocator: not enough memory")]
    )
    def test_memory_that_runs_out_once_weights_moved_is_not_tried_anew(self, error, at, what):
        class Greedy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, place):
                ctx.place = place
                return x.clone()

            @staticmethod
            def backward(ctx, slope):
                if ctx.place == at:
                    raise error
                return slope, None

        class Task:
            unit = "value"

            def loss(self, module, batch):
                x = Greedy.apply(module[0](torch.ones(1, 2)), 2)
                return Loss(Greedy.apply(module[1](x), 1).sum(-1), torch.ones(1))

        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        before = weights(module)
        optimizer = build_optimizer(AdamW(), module, learning_rate=0.1, adapters=False)
        with pytest.raises(what):
            train_step(module, Task(), [{}], optimizer, precision=CPU, max_grad_norm=None, during_backward=True)
        assert same_bits(before, weights(module)) == (at == 1)

    def test_nothing_scored_is_said_as_ever(self):
        class Task:
            unit = "token"

            def loss(self, module, batch):
                return Loss(module(torch.ones(1, 2))[:, 0] * 0, torch.zeros(1))

        module = nn.Linear(2, 1)
        optimizer = build_optimizer(AdamW(), module, learning_rate=0.1, adapters=False)
        for early in (False, True):
            with pytest.raises(DataError, match="no token of these rows is learnt"):
                train_step(module, Task(), [{}], optimizer, precision=CPU, max_grad_norm=None, during_backward=early)

    def test_a_course_takes_its_rates_and_goes_on_to_the_same_bits(self, base, tmp_path):
        found = []
        for n, optimizer in enumerate((AdamW(), EARLY)):
            section = TrainSection(max_steps=4, batch_size=4, evaluations=2, optimizer=optimizer, max_grad_norm=None)
            module = base.fresh()
            course(base, module, section, tmp_path / str(n))
            found.append(weights(module))
        assert same_bits(*found)


# ------------------------------------------------------------------------------------------------ bf16 weights


def course(base, module, section, folder, *, precision=CPU, validate=None):
    def held_out():
        loss = score(base.task, module, base.examples[-2:])
        return float(loss.total_B.sum() / loss.weight_B.sum())

    return run(
        module,
        base.task,
        base.examples[:-2],
        section,
        learning_rate=1e-3,
        adapters=False,
        precision=precision,
        validate=validate or held_out,
        places=Places(metrics=folder / "m.jsonl", checkpoints=folder / "c", keep=1, minutes=60.0),
    )


class TestRounding:
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("share", [0.0, 1 / 256, 0.25, 0.5, 0.9])
    def test_the_mean_of_many_roundings_is_the_number(self, sign, share):
        gap = 2.0**-7
        exact = torch.full((200_000,), sign * (1 + share * gap))
        found = rounded(exact, torch.Generator().manual_seed(1)).double()
        assert set(found.tolist()) <= {sign * 1.0, sign * (1.0 + gap)}
        spread = gap * math.sqrt(share * (1 - share) / len(exact))
        assert abs(float(found.mean() - exact[0].double())) <= 4 * spread + 1e-9

    def test_what_bf16_holds_already_stays(self):
        held = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-38])]).bfloat16()
        assert torch.equal(rounded(held.float(), torch.Generator().manual_seed(0)), held)

    def test_roundings_of_neighbours_are_independent_and_follow_the_seed(self):
        exact = torch.full((4000,), 1 + 0.5 * 2.0**-7)
        first, again, other = (rounded(exact, torch.Generator().manual_seed(seed)).float() for seed in (1, 1, 2))
        assert torch.equal(first, again)
        for one, two in ((first[1:], first[:-1]), (first, other)):
            assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.08


class TestAdamOnBf16:
    def test_in_float32_it_is_torchs(self):
        for amsgrad, decay in ((False, 0.1), (True, 0.0)):
            torch.manual_seed(4)
            theirs_on, ours_on = (nn.Parameter(torch.linspace(-1, 1, 60).view(6, 10)) for _ in range(2))
            group = {"weight_decay": decay}
            theirs = torch.optim.AdamW([{"params": [theirs_on], **group}], lr=0.02, betas=(0.8, 0.9), amsgrad=amsgrad)
            ours = RoundedAdam(
                [{"params": [ours_on], **group}], learning_rate=0.02, betas=(0.8, 0.9), amsgrad=amsgrad, seed=0
            )
            for _ in range(12):
                theirs_on.grad = torch.randn(6, 10)
                ours_on.grad = theirs_on.grad.clone()
                theirs.step()
                ours.step()
            torch.testing.assert_close(ours_on, theirs_on, rtol=1e-5, atol=1e-6)

    def test_it_is_taken_where_weights_rest_in_bf16_and_nowhere_else(self):
        def kind(section, dtype):
            return type(build_optimizer(section, nn.Linear(2, 2).to(dtype), learning_rate=0.1, adapters=False))

        assert kind(AdamW(), torch.bfloat16) is kind(Adam(), torch.bfloat16) is RoundedAdam
        assert kind(AdamW(), torch.float32) is torch.optim.AdamW
        assert kind(Adam(), torch.float32) is torch.optim.Adam

    def test_a_tiny_steady_update_that_nearest_rounding_loses_moves_the_weights_on_average(self):
        rate, steps, size = 1e-5, 200, 4096
        found = {}
        for name, make in (
            ("nearest", lambda p: torch.optim.AdamW([p], lr=rate, weight_decay=0.0)),
            ("by chance", lambda p: RoundedAdam([p], learning_rate=rate, betas=(0.9, 0.999), seed=7)),
        ):
            weight = nn.Parameter(torch.full((size,), 1.0, dtype=torch.bfloat16))
            optimizer = make(weight)
            for _ in range(steps):
                # A gradient that never changes makes a step of exactly the rate.
                weight.grad = torch.full_like(weight, -1.0)
                optimizer.step()
            found[name] = float((weight.detach().double() - 1.0).mean())
        assert found["nearest"] == 0.0
        wanted, gap = rate * steps, 2.0**-7
        share = wanted / gap
        assert found["by chance"] == pytest.approx(wanted, abs=4 * gap * math.sqrt(share * (1 - share) / size))

    def test_saved_and_loaded_it_goes_on_to_the_same_bits(self, base, tmp_path):
        section = TrainSection(max_steps=6, batch_size=4, evaluations=3, seed=2)
        whole = base.fresh(precision=BF16)
        course(base, whole, section, tmp_path / "whole", precision=BF16)
        module = base.fresh(precision=BF16)
        calls = []

        def stop():
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return 1.0 / len(calls)

        with pytest.raises(InterruptedRunError, match="after step 2 of 6"):
            course(base, module, section, tmp_path / "half", precision=BF16, validate=stop)
        module = base.fresh(precision=BF16)
        torch.manual_seed(1234)
        course(base, module, section, tmp_path / "half", precision=BF16)
        steps = [
            [line["loss"] for line in read_metrics(tmp_path / name / "m.jsonl") if line["kind"] == "step"]
            for name in ("whole", "half")
        ]
        assert len(steps[0]) == 6
        assert steps[0] == steps[1]
        assert all(t.dtype == torch.bfloat16 for t in weights(module).values())

    def test_its_moments_stay_in_float32_through_a_checkpoint(self):
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            module = nn.Linear(8, 8).bfloat16()
            found.append((module, build_optimizer(AdamW(), module, learning_rate=0.01, adapters=False, seed=5)))
        (module, optimizer), (other, fresh) = found
        draws = [torch.randn(8, 8).bfloat16() for _ in range(4)]
        for gradient in draws[:2]:
            module.weight.grad = gradient
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        fresh.load_state_dict(saved)
        other.load_state_dict(module.state_dict())
        state = fresh.state[other.weight]
        assert state["step"] == 2
        assert {v.dtype for v in state.values() if isinstance(v, torch.Tensor)} == {torch.float32}
        assert torch.equal(state["exp_avg"], saved["state"][0]["exp_avg"])
        for gradient in draws[2:]:
            module.weight.grad, other.weight.grad = gradient, gradient.clone()
            optimizer.step()
            fresh.step()
        assert torch.equal(module.weight, other.weight)

    def test_inside_the_backward_pass_it_rounds_alike(self, base):
        usual, _, optimizer = moved(base, AdamW(), (4,), precision=BF16)
        early, _, _ = moved(base, EARLY, (4,), precision=BF16)
        assert isinstance(optimizer, RoundedAdam)
        assert same_bits(weights(usual), weights(early))

    def test_it_evaluates_no_closure(self):
        optimizer = RoundedAdam([nn.Parameter(torch.ones(2))], learning_rate=0.1, betas=(0.9, 0.99), seed=0)
        with pytest.raises(TypeError):
            optimizer.step(lambda: 0.0)


# ------------------------------------------------------------------------------------------------ computed again


def gradients(module, task, batch, *, again, seed=3):
    """Each gradient of a batch, and the bytes that autograd kept for it."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    module.train()
    module.zero_grad(set_to_none=True)
    with lean(module), recomputing(module, wanted=again) as does:
        torch.manual_seed(seed)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = task.loss(module, batch).total_B.sum()
        loss.backward()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return does, float(loss.detach()), found, sum(storages.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: tiny.make(name, root / name) for name in ("llama", "gemma3", "gpt2", "bert", "t5")}


class TestActivationsComputedAgain:
    @pytest.mark.parametrize("method", [FullMethod(), LoRAMethod(rank=2, dropout=0.2)], ids=["full", "lora"])
    @pytest.mark.parametrize(
        ("name", "head"),
        [("llama", "causal"), ("gemma3", "causal"), ("gpt2", "causal"), ("bert", "classifier"), ("t5", "seq2seq")],
    )
    def test_the_gradient_is_the_same_and_less_is_kept(self, folders, name, head, method):
        if head == "classifier":
            section, labels = ClassifyTask(), ("a", "b")
            rows = tuple(Labelled(row.where, row.prompt, labels[n % 2]) for n, row in enumerate(ROWS))
        else:
            section, labels, rows = (ChatTask() if head == "seq2seq" else CompleteTask()), (), ROWS
        model = models.load(ModelSection(base=str(folders[name])), head=head, labels=labels)
        task = build(section, model.tokenizer, head=head, labels=labels, context=tiny.CONTEXT, seed=0)
        module = adapt(model.module, method, head=head, base_name="tiny", new=model.new).module
        task = task.suited(module)
        batch = task.collate(task.encode(rows, training=True)[:6])
        does, loss, wanted, kept = gradients(module, task, batch, again=False)
        does_again, loss_again, found, kept_again = gradients(module, task, batch, again=True)
        assert (does, does_again) == (False, True)
        assert loss_again == pytest.approx(loss, rel=1e-6)
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            assert (found[key] - gradient).abs().max() <= 1e-6 * gradient.abs().max().clamp(min=1e-3), key
        assert kept_again < 0.7 * kept
        # Afterwards the network is as it was.
        assert gradients(module, task, batch, again=False)[3] == pytest.approx(kept, rel=0.1)

    @pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("mixed", 4), ("bf16", 2)])
    def test_what_stays_of_a_block_is_the_residual_stream(self, precision, width):
        from transformers import AutoModelForCausalLM, LlamaConfig

        def kept(layers, rows):
            sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": layers, "vocab_size": 32}
            config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
            module = AutoModelForCausalLM.from_config(config).train()
            Precision(precision, torch.device("cpu")).place(module)
            parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
            seen, alive = {}, []

            def pack(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    seen[storage.data_ptr()] = storage.nbytes()
                    alive.append(tensor)
                return tensor

            ids = torch.zeros(rows, 128, dtype=torch.long)
            with (
                recomputing(module, wanted=True),
                Precision(precision, torch.device("cpu")).arithmetic(),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            ):
                module(input_ids=ids, use_cache=False).logits.float().sum()
            return sum(seen.values())

        rows = [kept(layers, 2) - kept(layers, 1) for layers in (1, 2, 3)]
        numbers = NUMBERS[precision]
        assert numbers.other == width
        per_block = [(rows[2] - rows[1]) / 128, (rows[1] - rows[0]) / 128]
        assert per_block[0] == per_block[1] == pytest.approx(width * 64, rel=0.01)

    def test_a_network_that_cannot_says_so_and_trains_on(self):
        with recomputing(nn.Linear(2, 2), wanted=True) as does:
            assert not does


# ------------------------------------------------------------------------------------------------ compiled


class TestCompiled:
    def test_it_does_not_go_with_blocks_that_are_computed_again(self):
        with pytest.raises(RecipeError, match=r"train\.compile is True.*passes over blocks"):
            recipe(compile=True, activation_checkpointing="on")
        assert recipe(compile=True).train.compile

    def test_without_a_compiler_it_is_refused_with_what_to_do(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(RecipeError, match="needs a C\\+\\+ compiler, and no-such-compiler is not there") as caught:
            check_compiler(torch.device("cpu"))
        assert "train.compile" in caught.value.faults[0].hint
        with pytest.raises(RecipeError, match="mps is none"):
            check_compiler(torch.device("mps"))

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
    @pytest.mark.filterwarnings("ignore")  # torch's compiler has some of its own
    def test_a_compiled_network_has_the_same_loss_and_gradient(self, base, tmp_path, monkeypatch):
        monkeypatch.setenv("METIER_CACHE", str(tmp_path))
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        torch.compiler.reset()  # what another test compiled in this process fits these blocks too
        module = base.fresh().train()
        task = base.task.suited(module)

        def taken(rows):
            module.zero_grad(set_to_none=True)
            loss = task.loss(module, task.collate(base.examples[:rows])).total_B.sum()
            loss.backward()
            return float(loss.detach()), {name: p.grad.clone() for name, p in module.named_parameters()}

        wanted = [taken(rows) for rows in (3, 6)]
        with compiled(module) as count:
            assert count == 2
            found = [taken(rows) for rows in (3, 6)]
        for (loss, slopes), (loss_found, slopes_found) in zip(wanted, found, strict=True):
            assert loss_found == pytest.approx(loss, rel=1e-5)
            for name, slope in slopes.items():
                torch.testing.assert_close(slopes_found[name], slope, rtol=1e-4, atol=1e-4)
        assert any((tmp_path / "compiled").rglob("*"))
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
        assert taken(3)[0] == wanted[0][0]

    def test_a_network_without_blocks_is_left_as_it_is(self):
        with compiled(nn.Linear(2, 2)) as count:
            assert count == 0
