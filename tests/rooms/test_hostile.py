"""Honest files of every kind are read to the bit without their classes; hostile ones run nothing and are refused in time."""

import collections
import importlib.util
import json
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from metier.core import UnsafeError
from metier.models import pickled

VANISHED = """
from torch import nn
import torch, enum, collections

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.width, self.heads, self.scale, self.name = width, heads, width ** -0.5, "注意"
        self.query, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(3, 3).tril().bool())
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.sizes, self.table = torch.Size([2, 3]), collections.OrderedDict(a=1)
        self.activation = nn.functional.gelu

class Network(nn.Module):
    def __init__(self, width=6, blocks=2, tied=True):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList([Attention(width, 2) for _ in range(blocks)])
        self.norm = nn.BatchNorm1d(width)
        self.parts = nn.ModuleDict({"a": nn.Sequential(nn.Linear(width, 2), nn.Dropout(0.2))})
        self.extra = nn.ParameterList([nn.Parameter(torch.randn(3))])
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

class Tagged(dict):
    pass
"""
LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.fixture
def vanished():
    """Classes that are there while a file is written, and gone when it is read."""
    module = types.ModuleType("vanished")
    sys.modules["vanished"] = module
    code = importlib.util.spec_from_loader("vanished", loader=None)
    module.__spec__ = code
    exec(VANISHED, module.__dict__)
    torch.manual_seed(0)
    yield module
    sys.modules.pop("vanished", None)


def parallel(v):
    return nn.DataParallel(v.Network())


def trained(v):
    network = v.Network()
    optimizer = torch.optim.AdamW(network.parameters(), amsgrad=True)
    network.head(network.embed(torch.arange(4))).sum().backward()
    optimizer.step()
    return {
        "epoch": 3, "net": network, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
        "args": v.Tagged(lr=0.1), "schedule": [1, 2.5, None, "x"],
    }  # fmt: skip


def attributes(v):
    network = v.Network()
    network.head.weight.tag = "kept elsewhere"
    return network


def views(v):
    whole = torch.arange(24.0)
    return {
        "part": whole[3:9],
        "turned": whole.view(4, 6).T,
        "strided": whole.view(4, 6)[1:, ::2],
        "spread": whole[:1].expand(7),
    }


def kinds(v):
    names = (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
        "complex64",
        "complex128",
    )
    newer = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
    state = {name: (torch.rand(3, 5) * 9).to(getattr(torch, name)) for name in names}
    return state | {name: torch.arange(6).float().to(getattr(torch, name)) for name in newer if hasattr(torch, name)}


HONEST = {
    "module": (lambda v: v.Network(), {}),
    "module, legacy": (lambda v: v.Network(), LEGACY),
    "module, protocol 3": (lambda v: v.Network(), {"pickle_protocol": 3}),
    "module, protocol 4": (lambda v: v.Network(), {"pickle_protocol": 4}),
    "module, protocol 5": (lambda v: v.Network(), {"pickle_protocol": 5}),
    "module, legacy, protocol 4": (lambda v: v.Network(), LEGACY | {"pickle_protocol": 4}),
    "module, untied": (lambda v: v.Network(tied=False), {}),
    "module in half precision": (lambda v: v.Network().half(), {}),
    "module in bfloat16": (lambda v: v.Network().bfloat16(), {}),
    "module in float64, legacy": (lambda v: v.Network().double(), LEGACY),
    "module of many blocks": (lambda v: v.Network(blocks=40), {}),
    "module with attributes on a parameter": (attributes, {}),
    "frozen module": (lambda v: v.Network().requires_grad_(requires_grad=False), {}),
    "module from torch alone": (lambda v: nn.TransformerEncoderLayer(8, 2), {}),
    "recurrent module": (lambda v: nn.LSTM(4, 5, num_layers=2), {}),
    "parallel module": (parallel, {}),
    "parallel module, legacy": (parallel, LEGACY),
    "state dict": (lambda v: v.Network().state_dict(), {}),
    "state dict, legacy": (lambda v: v.Network().state_dict(), LEGACY),
    "state dict, protocol 5": (lambda v: v.Network().state_dict(), {"pickle_protocol": 5}),
    "state dict as a plain dict": (lambda v: dict(v.Network().state_dict()), {}),
    "parallel state dict": (lambda v: parallel(v).state_dict(), {}),
    "checkpoint with module and optimizer": (trained, {}),
    "checkpoint, legacy": (trained, LEGACY),
    "checkpoint of a state dict": (lambda v: {"state_dict": v.Network().state_dict(), "step": 9}, {}),
    "views of one storage": (views, {}),
    "views of one storage, legacy": (views, LEGACY),
    "every type": (kinds, {}),
    "empty tensors": (lambda v: {"none": torch.empty(0, 7), "one": torch.tensor(2.5)}, {}),
    "parameters": (lambda v: {"w": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(3), requires_grad=False)}, {}),
}  # fmt: skip


def wanted(value):
    """What a state dict of the network in a value holds."""
    for key in ("net", "state_dict"):
        value = value[key] if isinstance(value, dict) and key in value else value
    value = value.module if isinstance(value, nn.DataParallel) else value
    state = value.state_dict() if isinstance(value, nn.Module) else value
    return {name.removeprefix("module."): tensor.detach() for name, tensor in state.items()}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_files_are_read_to_the_bit(tmp_path, vanished, kind):
    make, how = HONEST[kind]
    value = make(vanished)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old form misses the source of the classes
        torch.save(value, tmp_path / "m.pt", **how)
    state = wanted(value)
    del sys.modules["vanished"]
    found = pickled.read(tmp_path / "m.pt")
    assert set(found.tensors) == set(state)
    for name, tensor in state.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found.tensors[name]) == bits(tensor), name
    looked = pickled.look(tmp_path / "m.pt")
    assert (looked.kind, looked.calls) == (found.kind, ())
    assert {name: (t.dtype, t.shape, t.device.type) for name, t in looked.tensors.items()} == {
        name: (t.dtype, t.shape, "meta") for name, t in found.tensors.items()
    }


def bits(tensor):
    return bytes(tensor.clone(memory_format=torch.contiguous_format).untyped_storage())


def test_a_modules_tree_scalars_and_ties_survive(tmp_path, vanished):
    torch.save(vanished.Network(), tmp_path / "m.pt")
    del sys.modules["vanished"]
    found = pickled.read(tmp_path / "m.pt")
    assert found.classes["blocks.1"] == "vanished.Attention"
    assert (found.scalars["blocks.0.width"], found.scalars["blocks.0.name"], found.scalars["parts.a.1.p"]) == (
        6,
        "注意",
        0.2,
    )
    assert found.tensors["head.weight"].data_ptr() == found.tensors["embed.weight"].data_ptr()


@pytest.mark.skipif(sys.platform != "linux", reason="limits and the audit hook are measured on Linux")
def test_hostile_files_run_nothing_and_are_refused_within_time_and_memory(tmp_path):
    script = Path(__file__).parents[1] / "hostile.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 150
    assert [row for row in found if row["executed"] or row["ran"]] == []
    ended = collections.Counter(row["ended"] for row in found)
    assert set(ended) == {"ModelError", "UnsafeError"}, [row for row in found if "Error" not in row["ended"]]
    assert ended["UnsafeError"] >= 150
    assert all(len(row["said"].splitlines()) == 1 and "hostile.pt" in row["said"] for row in found)


def test_looking_names_what_would_have_been_called(tmp_path):
    torch.save(
        {"weights": Called(eval, "1 + 1"), "other": Called(getattr, Called(__import__, "os"), "system")},
        tmp_path / "m.pt",
    )
    with pytest.raises(UnsafeError, match=r"__builtin__.eval\('1 \+ 1'\)"):
        pickled.read(tmp_path / "m.pt")
    looked = pickled.look(tmp_path / "m.pt")
    assert looked.kind == "program"
    assert looked.calls == (
        "__builtin__.eval('1 + 1')",
        "__builtin__.__import__('os')",
        "__builtin__.getattr(__builtin__.__import__(...), ...)",
    )


class Called:
    def __init__(self, function, *arguments):
        self.made = (function, arguments)

    def __reduce__(self):
        return self.made
