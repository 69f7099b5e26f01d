"""The engine computes what the plain way computes: packed, shared, chunked, cut, lean, held to a float64 reference.

The reference is transformers' own code in float64, row by row, with every score of every place.
"""

import copy
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from plain_way import (
    GRADIENT,
    LABELS,
    LOSS,
    QUESTIONS,
    SYSTEM,
    chats,
    engines,
    exact,
    gradients,
    hold,
    reference,
    with_exact_norms,
)
from torch import nn
from torch.nn import functional as F

from metier import models, tasks
from metier.adapt import adapt, beside, in_one_pass, lean, why_apart
from metier.data.records import Completion, Conversation, Labelled, Message
from metier.models import lean as engine
from metier.models.lean.head import _Head
from metier.models.lean.rotary import turned
from metier.recipe import ChatTask, ClassifyTask, CompleteTask, FreezeMethod, LoRAMethod, ModelSection
from metier.tasks import causal


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("engine")
    return {name: tiny.make(name, root / name) for name in tiny.NAMES}


# ------------------------------------------------------------------------------------------------ packs and sharing


@pytest.mark.parametrize("name", tiny.CHAT)
@pytest.mark.parametrize("system", [False, True], ids=["plain", "system"])
@pytest.mark.parametrize("most", [100_000, 100, 1], ids=["one", "some", "each"])
def test_packs_and_shared_beginnings_change_neither_loss_nor_gradient(folders, name, system, most):
    found = exact(folders[name], ChatTask(), chats(system=system), head="causal")
    wanted = reference(found.module, found.plain, found.examples)
    task = found.plain.suited(found.module)
    assert task.layout.packed
    assert task.layout.shares
    if most == 100_000 and system:
        assert task.read(found.examples) < 0.7 * sum(map(task.size, found.examples))
    hold(engines(found.module, task, found.examples, most), wanted)


def test_gpt2_packs(folders):
    rows = [Completion(f"r:{i}", ask, reply) for i, (ask, reply) in enumerate(QUESTIONS)]
    found = exact(folders["gpt2"], CompleteTask(), rows, head="causal")
    wanted = reference(found.module, found.plain, found.examples)
    task = found.plain.suited(found.module)
    assert task.layout.packed
    hold(engines(found.module, task, found.examples), wanted)


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_encoders_pack(folders, name):
    rows = [Labelled(f"r:{i}", ask, LABELS[i % 3]) for i, (ask, _) in enumerate(QUESTIONS)]
    found = exact(folders[name], ClassifyTask(), rows, head="classifier")
    wanted = reference(found.module, found.plain, found.examples)
    task = found.plain.suited(found.module)
    assert task.layout.packed
    hold(engines(found.module, task, found.examples), wanted)


def test_a_beginning_is_shared_as_a_tree(folders):
    """System prompt for all, few-shot header for some: each stands once."""
    more = "Here is an example. Question: where is my parcel? Answer: near the door. Now answer the following question."
    rows = [
        *chats(system=True),
        *(
            Conversation(f"m:{i}", (Message("system", SYSTEM + more), *row.messages[1:]))
            for i, row in enumerate(chats(system=True))
        ),
    ]
    found = exact(folders["qwen3"], ChatTask(), rows, head="causal")
    task = found.plain.suited(found.module)
    _, packed = causal.lay(found.examples, task.layout)
    parents = [node for node in packed.pack.nodes if node.reach > node.end]
    assert any(a.reach >= b.reach and a.end <= b.start for a, b in pairwise(parents))
    hold(engines(found.module, task, found.examples), reference(found.module, found.plain, found.examples))


def test_a_sliding_window_is_kept_in_packs_and_over_shared_beginnings(folders):
    found = exact(folders["gemma3"], ChatTask(), chats(system=True), head="causal")
    assert found.module.config.sliding_window < max(len(e.ids) for e in found.examples)
    task = found.plain.suited(found.module)
    hold(engines(found.module, task, found.examples), reference(found.module, found.plain, found.examples))


def test_what_is_shared_ends_before_what_predicts_the_first_learnt_token(folders):
    """Two rows that differ in nothing but their reply: the last token of the prompt stands twice."""
    rows = [Completion(f"r:{i}", "Where is my parcel? " * 6, reply) for i, reply in enumerate(("Here.", "There."))]
    found = exact(folders["llama"], ChatTask(), rows, head="causal")
    task = found.plain.suited(found.module)
    _, packed = causal.lay(found.examples, task.layout)
    first = int(found.examples[0].learnt.int().argmax())
    assert packed.pack.nodes[0].end == first - 1
    hold(engines(found.module, task, found.examples), reference(found.module, found.plain, found.examples))


def test_a_beginning_may_end_within_a_character(folders):
    """Tokens are bytes of characters; rows that differ in a later byte of one share its first bytes, exactly."""
    rows = [Completion(f"r:{i}", "我的包裹" * 8 + odd, "好") for i, odd in enumerate(("🙂", "🙃", "😀"))]
    found = exact(folders["llama"], ChatTask(), rows, head="causal")
    task = found.plain.suited(found.module)
    _, packed = causal.lay(found.examples, task.layout)
    shared = found.examples[0].ids[: packed.pack.nodes[0].end]
    assert found.plain.tokenizer.decode(shared).endswith("\N{REPLACEMENT CHARACTER}")
    hold(engines(found.module, task, found.examples), reference(found.module, found.plain, found.examples))


def test_a_leak_between_rows_is_caught(folders):
    """The test of the tests: a row that sees its neighbour does not pass."""
    found = exact(folders["llama"], ChatTask(), chats(system=False), head="causal")
    task = found.plain.suited(found.module)
    wanted = reference(found.module, found.plain, found.examples)
    batch = dict(task.collate(found.examples))
    leaking = batch["attention_mask"].clone()
    leaking[0, 0, 0, 2] = leaking[0, 0, 1, 1]  # the first row reaches over the second
    found.module.train().zero_grad(set_to_none=True)
    nats = task.loss(found.module, batch | {"attention_mask": leaking}).total_B.sum()
    nats.backward()
    with pytest.raises(AssertionError):
        hold((float(nats.detach()), gradients(found.module)), wanted)
    positions = batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    found.module.zero_grad(set_to_none=True)
    nats = task.loss(found.module, positions).total_B.sum()
    nats.backward()
    with pytest.raises(AssertionError):
        hold((float(nats.detach()), gradients(found.module)), wanted)


def test_a_network_that_leaks_in_a_pack_is_never_packed(folders, monkeypatch):
    """Whether packs are safe is found out by trying: attention that forgets the rows is noticed."""
    found = exact(folders["llama"], ChatTask(), chats(system=False), head="causal")
    real = engine.Pack.of.__func__

    def forgetful(cls, mask):
        pack = real(cls, mask)
        return engine.Pack((engine.Node(0, pack.tokens, pack.tokens, 0),))

    monkeypatch.setattr(engine.Pack, "of", classmethod(forgetful))
    task = found.plain.suited(found.module)
    assert not task.layout.packed
    assert task.layout.why_not == "it answers otherwise in a pack"
    assert found.module.config._attn_implementation == "sdpa"
    hold(engines(found.module, task, found.examples), reference(found.module, found.plain, found.examples))


def test_a_network_with_attention_of_its_own_is_padded_and_says_so(folders):
    found = exact(folders["llama"], ChatTask(), chats(system=True), head="causal")
    found.module.set_attn_implementation("eager")
    task = found.plain.suited(found.module)
    assert not task.layout.packed
    said = tasks.reading(task, found.examples, tasks_section())
    assert said == ("rows are padded, in batches of like length: its attention is eager",)
    hold(engines(found.module, task, found.examples), reference(found.module, found.plain, found.examples))


def tasks_section(**words):
    from metier.recipe import TrainSection

    return TrainSection(**words)


def test_what_sharing_saves_and_which_rows_are_too_long_is_said(folders):
    found = exact(folders["llama"], ChatTask(), chats(system=True), head="causal")
    task = found.plain.suited(found.module)
    (long,) = tasks.reading(task, found.examples, tasks_section(batch_size=7, micro_batch_tokens=40))
    assert long == "7 rows are longer than train.micro_batch_tokens=40; each is read alone"
    (shared,) = tasks.reading(task, found.examples, tasks_section(batch_size=7))
    whole, read = sum(map(task.size, found.examples)), task.read(found.examples)
    assert shared.endswith(f"tokens is shared by 7 rows: {whole / read:.1f}x fewer tokens are read")


# ------------------------------------------------------------------------------------------------ head and loss


@pytest.mark.parametrize("cap", [None, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("places", [0, 1, 255, 256, 700])
def test_the_chunked_head_is_the_whole_one(cap, scale, weighted, places):
    chance = torch.Generator().manual_seed(places)
    draw = lambda *shape: torch.randn(*shape, generator=chance, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias = (x.requires_grad_() for x in (draw(places, 12), draw(50, 12), draw(50)))
    target = torch.randint(50, (places,), generator=chance)
    given = torch.rand(places, generator=chance, dtype=torch.float64) if weighted else torch.full((places,), 0.5)
    finish = engine.Finish(scale, cap)
    nats = engine.cross_entropy(hidden, weight, bias, target, finish)
    found = torch.autograd.grad((nats * given).sum(), (hidden, weight, bias))
    plain = F.cross_entropy(finish(F.linear(hidden, weight, bias)), target, reduction="none")
    wanted = torch.autograd.grad((plain * given).sum(), (hidden, weight, bias))
    torch.testing.assert_close(nats, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_head_in_few_passes_answers_as_in_many(dtype):
    """What a device does, held to what a CPU does."""
    chance = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=chance).to(dtype) for shape in ((90, 12), (50, 12), (50,)))
    target = torch.randint(50, (90,), generator=chance)
    head = _Head(weight, bias, target, engine.PLAIN, None, learns=True)
    nats, slope = head._plain_chunk(hidden, weight, slice(0, 90))
    wanted, wanted_slope = head._chunk(hidden, weight, slice(0, 90))
    room = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(nats, wanted, rtol=room, atol=room)
    torch.testing.assert_close(
        slope.to(wanted_slope.dtype), wanted_slope, rtol=room if room < 1e-6 else 1e-2, atol=1e-4
    )


def test_a_capped_head_is_recognised(folders):
    found = exact(folders["gemma3"], ChatTask(), chats(system=False), head="causal")
    found.module.config.final_logit_softcapping = 3.0
    task = found.plain.suited(found.module)
    assert task.layout.finish == engine.Finish(1.0, 3.0)
    hold(engines(found.module, task, found.examples), reference(found.module, found.plain, found.examples))


# ------------------------------------------------------------------------------------------------ lean modules


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_lean_modules_change_neither_loss_nor_gradient(folders, name, variant):
    found = exact(folders[name], ChatTask(), chats(system=True), head="causal")
    torch.manual_seed(1)
    module = adapt(found.module, LoRAMethod(rank=3, variant=variant), head="causal").module.double()
    for parameter_name, parameter in module.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    wanted = reference(module, found.plain, found.examples)
    task = found.plain.suited(module)
    before = {path: type(part) for path, part in module.named_modules()}
    names = [parameter_name for parameter_name, _ in module.named_parameters()]
    with lean(module):
        kinds = [type(part).__name__ for part in module.modules()]
        assert kinds.count("LoRALinear") == 7 * module.config.num_hidden_layers
        assert kinds.count("RMSNorm") >= 2 * module.config.num_hidden_layers + 1
        assert kinds.count("RotaryAttention") == module.config.num_hidden_layers
        assert (name == "gemma3") != ("GatedMLP" in kinds)
        assert [parameter_name for parameter_name, _ in module.named_parameters()] == names
        hold(engines(module, task, found.examples), wanted)
    assert {path: type(part) for path, part in module.named_modules()} == before
    hold(engines(module, task, found.examples), wanted)


def test_turning_queries_and_keys_is_the_plain_formula_both_ways():
    chance = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=chance, dtype=torch.float64)  # noqa: E731
    states = [draw(2, 5, 4, 6).requires_grad_(), draw(2, 5, 2, 6).requires_grad_()]
    cos, sin = draw(1, 5, 6), draw(1, 5, 6)  # of no angle, so that no half can stand for the other

    def plain(x):
        return x * cos[:, :, None] + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin[:, :, None]

    wanted, found = [plain(x) for x in states], turned(*states, cos, sin)
    given = [draw(*x.shape) for x in wanted]
    slopes = [torch.autograd.grad(sides, states, given) for sides in (found, wanted)]
    torch.testing.assert_close(list(found), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def test_a_window_that_only_the_call_tells_is_kept_by_what_stands_for_the_layer(folders):
    found = exact(folders["mistral"], ChatTask(), chats(system=True), head="causal")
    found.module.config.sliding_window = 24
    assert min(len(example.ids) for example in found.examples) > 24
    wanted = reference(found.module, found.plain, found.examples)
    task = found.plain.suited(found.module)
    with lean(found.module):
        assert type(found.module.model.layers[0].self_attn).__name__ == "RotaryAttention"
        hold(engines(found.module, task, found.examples), wanted)


def test_where_half_a_head_is_turned_the_networks_own_attention_answers(folders):
    from transformers import NemotronConfig, NemotronForCausalLM

    found = exact(folders["llama"], ChatTask(), chats(system=True), head="causal")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = NemotronConfig(
        vocab_size=len(found.plain.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, **heads
    )
    network = NemotronForCausalLM(config).double()
    task = found.plain.suited(network)
    assert task.layout.packed
    wanted = engines(network, task, found.examples)
    with lean(network):
        hold(engines(network, task, found.examples), wanted)


def test_attention_that_clips_stays_the_networks_own():
    from transformers import OlmoConfig, OlmoForCausalLM

    network = OlmoForCausalLM(
        OlmoConfig(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    assert engine.layout(network).packed
    for clip, kind in ((8.0, "OlmoAttention"), (None, "RotaryAttention")):
        network.config.clip_qkv = clip
        with lean(network):
            assert {type(layer.self_attn).__name__ for layer in network.model.layers} == {kind}


def test_with_a_cache_the_networks_own_attention_answers(folders):
    found = exact(folders["qwen3"], ChatTask(), chats(system=False), head="causal")
    module = found.module.eval()
    found.plain.suited(module)
    given = {"input_ids": found.examples[0].ids[None], "use_cache": True}
    wanted = module(**given).logits
    for layer in module.model.layers:
        layer.self_attn.attention_dropout = 0.5  # of which nothing may be seen outside of training
    with lean(module.train()):
        torch.testing.assert_close(module.eval()(**given).logits, wanted)
        assert module(**given).past_key_values.get_seq_length() == len(found.examples[0].ids)


@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize("bias", [False, True])
def test_a_lean_lora_layer_is_pefts(tokens, bias):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 24, bias=bias), nn.Tanh(), nn.Linear(24, 8, bias=bias)).double()
    wrapped = get_peft_model(net, LoraConfig(target_modules=["0", "2"], r=4, lora_alpha=6)).double()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    given = torch.randn(2, tokens, 40, dtype=torch.float64, requires_grad=True)
    moving = [p for p in wrapped.parameters() if p.requires_grad]
    plain = wrapped(given)
    wanted = torch.autograd.grad(plain.square().sum(), [given, *moving])
    with lean(wrapped):
        found = wrapped(given)
        slopes = torch.autograd.grad(found.square().sum(), [given, *moving])
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "method", [LoRAMethod(rank=3, dropout=0.1), LoRAMethod(rank=3, variant="dora")], ids=["dropout", "dora"]
)
def test_what_peft_does_otherwise_goes_pefts_own_way(folders, method):
    found = exact(folders["llama"], ChatTask(), chats(system=True), head="causal", dtype=torch.float32)
    module = adapt(found.module, method, head="causal").module
    task = found.plain.suited(module)
    assert task.layout.packed
    assert task.layout.shares == (method.dropout == 0)
    with lean(module):
        assert "LoRALinear" not in [type(part).__name__ for part in module.modules()]


def test_nothing_below_the_lowest_adapter_has_a_gradient(folders):
    """The graph ends where nothing moves any more: no slope is computed for what stands below."""
    found = exact(folders["llama"], ChatTask(), chats(system=False), head="causal")
    last = found.module.config.num_hidden_layers - 1
    targets = (f"layers.{last}.mlp.down_proj",)
    module = adapt(found.module, LoRAMethod(rank=2, targets=targets), head="causal").module.double()
    task = found.plain.suited(module)
    seen = []
    layers = module.get_base_model().model.layers
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    with lean(module):
        task.loss(module, task.collate(found.examples)).total_B.sum().backward()
    assert seen == [False] * last + [True]


# ------------------------------------------------------------------------------------------------ kept states


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("room", [1 << 30, 0], ids=["memory", "file"])
@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_states_below_everything_that_moves_are_computed_once(folders, name, room, method):
    found = exact(folders[name], ChatTask(), chats(system=True), head="causal")
    last = found.module.config.num_hidden_layers - 1
    torch.manual_seed(1)
    how = (
        LoRAMethod(rank=2, targets=(f"layers.{last}.self_attn.q_proj",)) if method == "lora" else FreezeMethod(blocks=1)
    )
    module = adapt(found.module, how, head="causal").module.double()
    for parameter_name, parameter in module.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    wanted = reference(module, found.plain, found.examples)
    task = found.plain.suited(module)
    assert task.layout.packed
    assert not task.layout.shares
    names = [parameter_name for parameter_name, p in module.named_parameters() if p.requires_grad]
    store, ran = engine.Store(room), []
    with lean(module, store) as kept:
        assert kept is store
        assert [parameter_name for parameter_name, p in module.named_parameters() if p.requires_grad] == names
        stack = module.get_base_model().model.layers if method == "lora" else module.model.layers
        stack[0].block.register_forward_hook(lambda *_: ran.append(1))
        live = engines(module, task, found.examples)
        assert (len(ran), store.served) == (1, 0)
        again = engines(module, task, found.examples)
        cut = engines(module, task, found.examples, 60)  # other packs, the same rows
        assert len(ran) == 1
        assert store.served == 2 * sum(map(task.size, found.examples))
        assert (store.in_file_bytes > 0) == (room == 0)
    assert live[0] == again[0]
    assert all(torch.equal(slope, again[1][key]) for key, slope in live[1].items())
    for case in (live, again, cut):
        hold(case, wanted)
    with lean(module, store):  # another run on the same base
        hold(engines(module, task, found.examples), wanted)
    assert store.served == 3 * sum(map(task.size, found.examples))


def test_nothing_is_kept_where_the_first_block_moves_or_something_is_dropped(folders):
    found = exact(folders["llama"], ChatTask(), chats(system=False), head="causal", dtype=torch.float32)
    with lean(found.module) as kept:  # everything moves
        assert kept is None
    module = adapt(found.module, LoRAMethod(rank=2), head="causal").module
    assert engine.trunk_depth(module) == 0
    gpt2 = models.load(ModelSection(base=str(folders["gpt2"])), head="causal").module
    assert engine.trunk_depth(adapt(gpt2, FreezeMethod(blocks=1), head="causal").module) == 0


# ------------------------------------------------------------------------------------------------ several adapters


def arms_on(found, methods, *, head, new=()):
    """A network for each method, on one base; what they add is random."""
    torch.manual_seed(2)
    modules = [beside(found.module, method, head=head, new=new).module.double() for method in methods]
    for module in modules:
        for name, parameter in module.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.1)
    return modules


def in_passes(base, modules, named, store=None, mix_up=lambda numbers: numbers):
    """Loss and gradients of every arm when all are trained in one pass; each arm has its task and rows by name."""
    for module in modules:
        module.zero_grad(set_to_none=True)
    totals = [0.0] * len(modules)
    with in_one_pass(base, modules, store) as (network, lanes):
        network.train()
        whole = tasks.joined([task.collate(rows) for _, task, rows in named])
        numbers = [number for number, _, _ in named]
        with lanes.laid(mix_up(numbers), whole.tokens, whole.rows):
            nats = named[0][1].loss(network, whole.batch).total_B
            nats.sum().backward()
        for number, part in zip(numbers, nats.detach().split(list(whole.rows)), strict=True):
            totals[number] += float(part.sum())
    return [(total, gradients(module)) for total, module in zip(totals, modules, strict=True)]


RANKS = (
    LoRAMethod(rank=2),
    LoRAMethod(rank=5, alpha=7, variant="rslora"),
    LoRAMethod(rank=3, targets=("q_proj", "down_proj")),
)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("system", [False, True], ids=["plain", "system"])
def test_adapters_in_one_pass_have_the_gradients_that_each_has_alone(folders, name, system):
    found = exact(folders[name], ChatTask(), chats(system=system), head="causal")
    task = found.plain.suited(found.module)
    modules = arms_on(found, RANKS, head="causal")
    rows = [found.examples, found.examples[2:5], found.examples[1:]]
    wanted = [reference(module, found.plain, some) for module, some in zip(modules, rows, strict=True)]
    named = [(number, task.suited(modules[number]), rows[number]) for number in (0, 1, 2)]
    assert all(task.layout.packed and task.layout.shares for _, task, _ in named)
    assert not why_apart(modules)
    for one, other in zip(in_passes(found.module, modules, named), wanted, strict=True):
        hold(one, other)
    cut = [(0, named[0][1], rows[0][:3]), (0, named[0][1], rows[0][3:]), named[1], named[2]]
    for one, other in zip(in_passes(found.module, modules, cut), wanted, strict=True):
        hold(one, other)


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_encoders_with_heads_of_their_own_meet_in_one_pass(folders, name):
    rows = [Labelled(f"r:{i}", ask, LABELS[i % 3]) for i, (ask, _) in enumerate(QUESTIONS)]
    found = exact(folders[name], ClassifyTask(), rows, head="classifier")
    task = found.plain.suited(found.module)
    new = [name for name, _ in found.module.named_parameters() if name.startswith(("classifier", "bert.pooler"))]
    modules = arms_on(found, (LoRAMethod(rank=2), LoRAMethod(rank=4)), head="classifier", new=new)
    rows = [found.examples, found.examples[3:]]
    wanted = [reference(module, found.plain, some) for module, some in zip(modules, rows, strict=True)]
    assert any("modules_to_save" in path for path in wanted[0][1])
    found_so = in_passes(found.module, modules, [(i, task.suited(modules[i]), rows[i]) for i in (0, 1)])
    for one, other in zip(found_so, wanted, strict=True):
        hold(one, other)


def test_adapters_that_are_mixed_up_are_caught(folders):
    """The test of the tests: rows that meet another arm's adapter do not pass."""
    found = exact(folders["llama"], ChatTask(), chats(system=False), head="causal")
    task = found.plain.suited(found.module)
    modules = arms_on(found, (LoRAMethod(rank=2), LoRAMethod(rank=2)), head="causal")
    wanted = [reference(module, found.plain, found.examples) for module in modules]
    named = [(number, task, found.examples) for number in (0, 1)]
    for one, other in zip(in_passes(found.module, modules, named), wanted, strict=True):
        hold(one, other)
    for one, other in zip(in_passes(found.module, modules, named, mix_up=lambda n: n[::-1]), wanted, strict=True):
        with pytest.raises(AssertionError):
            hold(one, other)
    shifted = [(0, task, found.examples), (1, task, found.examples[:-1])]
    short = in_passes(found.module, modules, shifted)
    with pytest.raises(AssertionError):
        hold(short[1], wanted[1])


def test_what_stands_below_every_adapter_is_kept_for_all(folders):
    found = exact(folders["llama"], ChatTask(), chats(system=True), head="causal")
    last = found.module.config.num_hidden_layers - 1
    methods = [LoRAMethod(rank=rank, targets=(f"layers.{last}.self_attn.q_proj",)) for rank in (2, 3)]
    modules, store = arms_on(found, methods, head="causal"), engine.Store()
    task = found.plain.suited(found.module).suited(modules[0])
    wanted = [reference(module, found.plain, found.examples) for module in modules]
    named = [(number, task, found.examples) for number in (0, 1)]
    for served in (0, 2):
        for one, other in zip(in_passes(found.module, modules, named, store), wanted, strict=True):
            hold(one, other)
        assert store.served == served * sum(map(task.size, found.examples))


def test_layers_that_are_not_plain_linear_ones_keep_adapters_apart(folders):
    rows = [Completion(f"r:{i}", ask, reply) for i, (ask, reply) in enumerate(QUESTIONS)]
    found = exact(folders["gpt2"], CompleteTask(), rows, head="causal")
    assert "c_attn has more than" in why_apart(arms_on(found, [LoRAMethod(rank=2)], head="causal"))
    found = exact(folders["llama"], ChatTask(), chats(system=False), head="causal")
    assert "q_proj has more than" in why_apart(arms_on(found, [LoRAMethod(rank=2, variant="dora")], head="causal"))


# ------------------------------------------------------------------------------------------------ the real model


def gsm8k():
    path = Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(400)]
    short = sorted(rows, key=lambda row: len(row["prompt"] + row["completion"]))[:8]
    return [Completion(f"g:{i}", row["prompt"], row["completion"]) for i, row in enumerate(short)]


def test_smollm2_on_eight_rows():
    """The engine in float32 against the plain way in float64; the plain way in float32 is no nearer."""
    model = models.load(ModelSection(base="demo:smollm2-135m"), head="causal")
    torch.manual_seed(0)
    module = adapt(model.module, LoRAMethod(rank=4), head="causal").module
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    plain = tasks.build(ChatTask(), model.tokenizer, head="causal", labels=(), context=8192, seed=0)
    examples = plain.encode(gsm8k(), training=True)
    twin = copy.deepcopy(module)
    wanted = reference(with_exact_norms(twin.double()), plain, examples)
    usual = reference(module, plain, examples)
    task = plain.suited(module)
    with lean(module):
        found = engines(module, task, examples)
    assert found[0] == pytest.approx(wanted[0], rel=LOSS)
    assert error(found, wanted) <= max(GRADIENT, error(usual, wanted))


def error(found, wanted):
    """Distance of all gradients together, relative."""
    apart = sum(float((found[1][name].double() - slope).square().sum()) for name, slope in wanted[1].items())
    return math.sqrt(apart / sum(float(slope.square().sum()) for slope in wanted[1].values()))


# ------------------------------------------------------------------------------------------------ held to the base


def moved(module, *, by=0.3):
    """The network after it has moved a little, in place."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=by)
    return module


def held_reference(module, examples):
    """Loss and gradients with the divergence from the teacher, row by row, by its definition."""
    module.train().zero_grad(set_to_none=True)
    total = 0.0
    for example in examples:
        places = example.learnt.nonzero()[:, 0]
        log_NV = F.log_softmax(module(input_ids=example.ids[None]).logits[0, places - 1], dim=-1)
        nats = -log_NV[torch.arange(len(places)), example.ids[places]].sum()
        token_NK, share_NL, weight = example.teacher
        for log_V, token_K, share_L in zip(log_NV, token_NK, share_NL.double(), strict=True):
            others = torch.ones(len(log_V), dtype=torch.bool)
            others[token_K] = False
            log_L = torch.cat([log_V[token_K], log_V[others].exp().sum().log()[None]])
            nats = nats + weight * (share_L * (share_L.log() - log_L)).sum()
        nats.backward()
        total += float(nats.detach())
    return total, gradients(module)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("most", [100_000, 100, 1], ids=["one", "some", "each"])
def test_the_divergence_from_the_base_and_its_gradient_are_exact(folders, name, most):
    found = exact(folders[name], ChatTask(), chats(system=True), head="causal")
    task = found.plain.suited(found.module)
    rows = tasks.taught(task, found.module, found.examples, weight=0.7)
    moved(found.module)
    wanted = held_reference(found.module, rows)
    hold(engines(found.module, task, list(rows), most), wanted)
    # A network of which nothing is known but its scores is held in the plain way.
    hold(engines(found.module, found.plain, list(rows), most), wanted)
    without = engines(found.module, task, found.examples, most)
    assert wanted[0] > 1.005 * without[0], "the divergence must weigh more than what is tolerated"


@pytest.mark.parametrize("finish", [engine.PLAIN, engine.Finish(0.5), engine.Finish(1.0, 2.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_held_to_a_teacher_has_the_slopes_of_autograd(finish, bias):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset, teacher = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((600, 8), (50, 8), (50,), (600, 50))
    )
    target = torch.randint(50, (600,), generator=generator)
    given = [x.requires_grad_() for x in ((hidden, weight, offset) if bias else (hidden, weight))]
    held = engine.Teacher(*engine.top_shares(3 * teacher, 7), 0.4)
    scores = finish(F.linear(hidden, weight, offset if bias else None))
    plain = F.cross_entropy(scores, target, reduction="none") + 0.4 * engine.divergence(scores, held)
    found = engine.cross_entropy(hidden, weight, offset if bias else None, target, finish, held)
    assert torch.allclose(found, plain, rtol=1e-12)
    for row_weights in (torch.ones(600).double(), torch.rand(600, generator=generator).double()):
        for one, two in zip(
            torch.autograd.grad(found @ row_weights, given, retain_graph=True),
            torch.autograd.grad(plain @ row_weights, given, retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)


def test_a_network_that_has_not_moved_is_pulled_nowhere(folders):
    found = exact(folders["llama"], ChatTask(), chats(system=False), head="causal", dtype=torch.float32)
    task = found.plain.suited(found.module)
    rows = list(tasks.taught(task, found.module, found.examples, weight=100.0))
    plain, held = (engines(found.module, task, some) for some in (found.examples, rows))
    hold(held, plain, loss=1e-4, gradient=1e-3)
    assert torch.allclose(rows[0].teacher.share_NL.sum(dim=1), torch.ones(len(rows[0].teacher.share_NL)), atol=1e-5)
