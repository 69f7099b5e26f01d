"""The same on a GPU: its kernels, number formats and memory held to the float64 reference. Skipped where there is none."""

import copy

import pytest
import tiny
import torch
from plain_way import SYSTEM, chats, engines, exact, gradients, reference
from torch import nn
from torch.nn import functional as F

from metier.adapt import adapt, lean
from metier.data.records import Conversation, Message
from metier.models import lean as engine
from metier.recipe import AdamW, ChatTask, Constant, LoRAMethod, TrainSection
from metier.tasks import to_device
from metier.training import Precision, build_optimizer, build_schedule, fit
from metier.training.batches import steps as batches
from metier.training.rounding import RoundedAdam

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("device")
    return {name: tiny.make(name, root / name) for name in tiny.CHAT}


class OnDevice:
    """A task whose batches go to the device."""

    def __init__(self, task):
        self.inner, self.cut, self.layout = task, task.cut, task.layout

    def collate(self, examples):
        return to_device(self.inner.collate(examples), torch.device("cuda"))

    def loss(self, module, batch):
        return self.inner.loss(module, batch)


def tree():
    """A system prompt for all, more of it for some: sharing in two levels."""
    more = "Here is an example. Question: where is my parcel? Answer: near the door. Now answer the following question."
    rows = chats(system=True)
    return [
        *rows,
        *(Conversation(f"m:{i}", (Message("system", SYSTEM + more), *r.messages[1:])) for i, r in enumerate(rows)),
    ]


def errors(found, wanted):
    """Relative error of the loss, and of the gradient as one vector."""
    apart = sum(float((found[1][name].cpu().double() - g).square().sum()) for name, g in wanted[1].items())
    return abs(found[0] / wanted[0] - 1), (apart / sum(float(g.square().sum()) for g in wanted[1].values())) ** 0.5


def plainly(module, examples):
    """transformers' own code on the device, row by row, with SDPA."""
    module.set_attn_implementation("sdpa")
    module.train().zero_grad(set_to_none=True)
    total = 0.0
    for example in examples:
        ids, learnt = example.ids[None].cuda(), example.learnt[1:]
        scores = module(input_ids=ids).logits[0, :-1][learnt].float()
        nats = F.cross_entropy(scores, ids[0, 1:][learnt], reduction="sum")
        nats.backward()
        total += float(nats.detach())
    return total, gradients(module)


@pytest.mark.parametrize("name", tiny.CHAT)
@pytest.mark.parametrize("rows", [chats(system=False), tree()], ids=["apart", "tree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packs_on_a_gpu_are_as_exact_as_transformers_row_by_row(folders, name, rows, dtype):
    wanted_from = exact(folders[name], ChatTask(), rows, head="causal")
    module = copy.deepcopy(wanted_from.module).to("cuda", dtype)
    # The reference has the same weights, rounded as the device's are.
    wanted_from.module.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    wanted = reference(wanted_from.module, wanted_from.plain, wanted_from.examples)
    task = wanted_from.plain.suited(module)
    assert task.layout.packed
    assert task.layout.shares
    with lean(module):
        found = engines(module, OnDevice(task), wanted_from.examples)
    mine, theirs = errors(found, wanted), errors(plainly(module, wanted_from.examples), wanted)
    if dtype == torch.float32:
        assert mine[0] < 1e-5
        assert mine[1] < 1e-4
    else:
        assert mine[0] < max(2 * theirs[0], 2e-3)
        assert mine[1] < max(1.5 * theirs[1], 1e-2), (mine, theirs)


@pytest.mark.parametrize("places", [0, 1, 700])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_the_head_on_a_gpu_is_the_whole_one(places, weighted):
    chance = torch.Generator("cuda").manual_seed(places)
    draw = lambda *shape: torch.randn(*shape, generator=chance, dtype=torch.float64, device="cuda")  # noqa: E731
    hidden, weight, bias = (x.requires_grad_() for x in (draw(places, 12), draw(50, 12), draw(50)))
    target = torch.randint(50, (places,), generator=chance, device="cuda")
    given = draw(places).exp() if weighted else torch.full((places,), 0.5, dtype=torch.float64, device="cuda")
    nats = engine.cross_entropy(hidden, weight, bias, target)
    found = torch.autograd.grad((nats * given).sum(), (hidden, weight, bias))
    plain = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none")
    wanted = torch.autograd.grad((plain * given).sum(), (hidden, weight, bias))
    torch.testing.assert_close(nats, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [50, 4096, 50_257])
def test_cross_entropy_by_the_kernel_is_that_of_its_scores(dtype, width):
    chance = torch.Generator("cuda").manual_seed(width)
    hidden = (2 * torch.randn(37, 64, generator=chance, device="cuda")).to(dtype).requires_grad_()
    weight = torch.randn(width, 64, generator=chance, device="cuda").to(dtype) / 4
    target = torch.randint(width, (37,), generator=chance, device="cuda")
    with torch.no_grad():
        scores = F.linear(hidden, weight).double().requires_grad_()
    wanted = F.cross_entropy(scores, target, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), scores)
    nats = engine.cross_entropy(hidden, weight, None, target)
    torch.testing.assert_close(nats.double(), wanted, rtol=1e-5, atol=1e-5)
    (of_hidden,) = torch.autograd.grad(nats.sum(), hidden)
    exact_slope = slope @ weight.double()
    room = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert float((of_hidden.double() - exact_slope).norm() / exact_slope.norm()) < room
    with torch.no_grad():
        torch.testing.assert_close(engine.cross_entropy(hidden, weight, None, target), nats)


def test_adam_moves_parameters_of_many_sizes_in_one_call_as_one_by_one():
    chance = torch.Generator().manual_seed(0)
    sizes = [(5000,), (37,), (64, 70), (4096,), (1,)]
    begun, slopes = ([torch.randn(size, generator=chance).bfloat16() for size in sizes] for _ in range(2))

    def moved(device):
        weights = [nn.Parameter(x.to(device, copy=True)) for x in begun]
        optimizer = RoundedAdam(weights, learning_rate=1e-2, betas=(0.9, 0.99), seed=0)
        for _ in range(3):
            for weight, slope in zip(weights, slopes, strict=True):
                weight.grad = slope.to(device, copy=True)
            optimizer.step()
        return weights, [optimizer.state[weight] for weight in weights]

    (mine, states), (wanted, known) = moved("cuda"), moved("cpu")
    for weight, other in zip(mine, wanted, strict=True):
        # Roundings by chance differ from kernel to kernel: by one place in 256, three times.
        torch.testing.assert_close(weight.cpu().float(), other.float(), rtol=3 / 128, atol=1e-3)
    for state, other in zip(states, known, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name].cpu(), other[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_learns_in_every_format(folders, name, method):
    found = exact(folders["qwen3"], ChatTask(), chats(system=True), head="causal", dtype=torch.float32)
    module = found.module if method == "full" else adapt(found.module, LoRAMethod(rank=4), head="causal").module
    precision = Precision(name, torch.device("cuda"))
    precision.place(module)
    task = found.plain.suited(module)
    section = TrainSection(batch_size=7, max_steps=30, epochs=30, micro_batch_tokens=4096, precision=name)
    optimizer = build_optimizer(AdamW(), module, learning_rate=1e-2, adapters=method == "lora")
    schedule = build_schedule(Constant(), optimizer, total_steps=30, steps_per_epoch=1)
    with lean(module):
        order = batches(len(found.examples), section, last=30)
        records = list(
            fit(module, task, found.examples, order, optimizer, schedule, precision=precision, section=section)
        )
    assert records[-1].loss < 0.95 * records[0].loss


def test_a_step_that_does_not_fit_is_taken_in_parts_with_the_same_gradient(folders):
    rows = chats(system=False) * 40
    found = exact(folders["llama"], ChatTask(), rows, head="causal", dtype=torch.float32)
    module = found.module.cuda()
    task = found.plain.suited(module)

    def losses(budget):
        net = copy.deepcopy(module)
        section = TrainSection(batch_size=len(rows), max_steps=2, micro_batch_tokens=budget, precision="fp32")
        optimizer = build_optimizer(AdamW(), net, learning_rate=1e-3, adapters=False)
        schedule = build_schedule(Constant(), optimizer, total_steps=2, steps_per_epoch=1)
        precision = Precision("fp32", torch.device("cuda"))
        order = batches(len(rows), section, last=2)
        return list(fit(net, task, found.examples, order, optimizer, schedule, precision=precision, section=section))

    wanted = losses(2048)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() + 24 * 2**20
    torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
    try:
        records = losses(1_000_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert records[-1].most_tokens < 1_000_000
    for mine, theirs in zip(records, wanted, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


def test_rounding_by_chance_loses_nothing_on_average():
    weight = nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16, device="cuda"))
    optimizer = RoundedAdam([weight], learning_rate=1e-5, betas=(0.9, 0.999), seed=0)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # 50 updates of 1e-5 are an eighth of the distance to the next bf16 number below 1.
    assert float(weight.double().mean()) == pytest.approx(1 - 50e-5, abs=1e-5)
