"""The strength dial: exact at both ends, a straight line between, for every method and any network."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn

from metier import models
from metier.adapt import adapt, load_adapter, merged, moving_weights, save_adapter, set_strength
from metier.models import write_tensors
from metier.recipe import FreezeMethod, FullMethod, LoRAMethod, ModelSection

METHODS = {
    "full": FullMethod(),
    "freeze": FreezeMethod(blocks=1),
    "lora": LoRAMethod(rank=4),
    "dora": LoRAMethod(rank=4, variant="dora"),
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A causal model, and a classifier with a new head; each with tokens to read."""
    made = {}
    for name, head, labels in (("llama", "causal", ()), ("bert", "classifier", ("a", "b"))):
        folder = tiny.make(name, tmp_path_factory.mktemp("tiny") / name)
        made[head] = models.load(ModelSection(base=str(folder)), head=head, labels=labels)
    return made


def tuned(model, method) -> SimpleNamespace:
    """A network that has moved, with copies of what moved before and after."""
    adapted = adapt(copy.deepcopy(model.module), METHODS[method], head=model.head, new=model.new).module.eval()
    before = {name: tensor.clone() for name, tensor in moving_weights(adapted).items()}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in moving_weights(adapted).values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
    after = {name: tensor.clone() for name, tensor in moving_weights(adapted).items()}
    return SimpleNamespace(module=adapted, start=before.__getitem__, end=after.__getitem__, after=after)


def answer(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=torch.arange(5, 15).view(1, 10)).logits


@every_method
def test_nothing_of_the_update_is_the_base_to_the_last_bit(bases, method):
    model = bases["causal"]
    found = tuned(model, method)
    assert (answer(found.module) - answer(model.module)).abs().max() > 0.01
    set_strength(found.module, 0, start=found.start, end=found.end)
    if method == "dora":  # its division by the length of the columns rounds, at the start of training as well
        assert torch.allclose(answer(found.module), answer(model.module), atol=1e-5)
    else:
        assert torch.equal(answer(found.module), answer(model.module))


@every_method
def test_all_of_the_update_is_the_tuned_network_to_the_last_bit(bases, method):
    found = tuned(bases["causal"], method)
    whole = answer(found.module)
    set_strength(found.module, 0.3, start=found.start, end=found.end)
    assert not torch.equal(answer(found.module), whole)
    set_strength(found.module, 1, start=found.start, end=found.end)
    assert torch.equal(answer(found.module), whole)
    assert all(torch.equal(tensor, found.after[name]) for name, tensor in moving_weights(found.module).items())


def test_lora_at_a_share_is_lora_with_a_smaller_scale(bases):
    found = tuned(bases["causal"], "lora")
    scaled = copy.deepcopy(found.module)
    for layer in scaled.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] *= 0.7
    set_strength(found.module, 0.7, start=found.start, end=found.end)
    assert torch.allclose(answer(found.module), answer(scaled), atol=1e-5)


def test_merged_weights_lie_on_the_line_whatever_the_method(bases):
    model = bases["causal"]
    base = model.module.state_dict()
    for method in ("full", "lora"):
        found, ends = tuned(model, method), []
        for share in (1, 0.25):
            set_strength(found.module, share, start=found.start, end=found.end)
            one = copy.deepcopy(found.module)
            ends.append((merged(one) if method == "lora" else one).state_dict())
        for name, whole in ends[0].items():
            assert torch.allclose(ends[1][name], base[name] + 0.25 * (whole - base[name]), atol=1e-6), name


def test_a_saved_adapter_has_the_share(bases, tmp_path):
    model = bases["causal"]
    found = tuned(model, "lora")
    set_strength(found.module, 0.5, start=found.start, end=found.end)
    save_adapter(found.module, tmp_path)
    loaded = load_adapter(copy.deepcopy(model.module), tmp_path)
    assert torch.allclose(answer(loaded), answer(found.module), atol=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_new_head_stays_as_it_was_tuned(bases, method):
    model = bases["classifier"]
    found = tuned(model, method)
    head = {name: t.clone() for name, t in moving_weights(found.module).items() if "classifier" in name}
    set_strength(found.module, 0, start=found.start, end=found.end, new=model.new)
    moved = moving_weights(found.module)
    assert head
    assert all(torch.equal(moved[name], tensor) for name, tensor in head.items())
    set_strength(found.module, 0, start=found.start, end=found.end)
    assert not all(torch.equal(moved[name], tensor) for name, tensor in head.items())


def test_any_network_from_files_and_counters_stay(tmp_path):
    torch.manual_seed(0)
    module = adapt(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), FullMethod()).module
    write_tensors(moving_weights(module), tmp_path / "start")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        module.train()(torch.randn(16, 4))
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    write_tensors(moving_weights(module), tmp_path / "end")
    after = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with safe_open(tmp_path / "start", "pt") as start, safe_open(tmp_path / "end", "pt") as end:
        set_strength(module, 0.5, start=start.get_tensor, end=end.get_tensor)
    for name, tensor in module.state_dict().items():
        expected = after[name] if "num_batches" in name else (before[name] + after[name]) / 2
        assert torch.allclose(tensor, expected, atol=1e-6), name
