"""What a checkpoint holds is told of every kind, without loading or running anything."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from metier.core import ModelError
from metier.models import inspect, safetensors_file
from metier.models.source import code_digest
from metier.render import inspected

STATE = {"embed.weight": torch.ones(5, 2), "head.weight": torch.ones(3, 2).bfloat16(), "steps": torch.tensor(3)}
WANTED = {"embed.weight": ((5, 2), 40), "head.weight": ((3, 2), 12), "steps": ((), 8)}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.inner = 3, nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.25))


class Called:
    def __reduce__(self):
        return eval, ("1 + 1\x1b[2J",)


def held(found):
    return {tensor.name: (tensor.shape, tensor.bytes) for tensor in found.tensors}


def folder_of(path, **config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(STATE, path / "model.safetensors")
    return path


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = inspect(tmp_path / "m.safetensors")
    assert (found.format, held(found), found.facts) == ("safetensors", WANTED, {"format": "pt"})
    assert found.recipe == ("use: package.module:Class", f"base: {tmp_path / 'm.safetensors'}")
    assert inspected.as_json(found)["parameters"] == 17
    assert inspected.as_json(found)["dtypes"]["BF16"] == {"tensors": 1, "bytes": 12}


def test_shards(tmp_path):
    weight_map = {}
    for number, (name, tensor) in enumerate(STATE.items()):
        save_file({name: tensor}, tmp_path / f"{number}.safetensors")
        weight_map[name] = f"{number}.safetensors"
    (tmp_path / safetensors_file.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = inspect(tmp_path / safetensors_file.INDEX)
    assert (found.format, held(found)) == ("safetensors in 3 shards", WANTED)
    (tmp_path / "config.json").write_text("{}")
    assert inspect(tmp_path).format == "model folder, safetensors in 3 shards"


@pytest.mark.parametrize(("how", "form"), [({}, "zip"), ({"_use_new_zipfile_serialization": False}, "legacy")])
def test_files_of_torch(tmp_path, how, form):
    path = tmp_path / "m.pt"
    torch.save(STATE, path, **how)
    found = inspect(path)
    assert (found.format, held(found), found.calls) == (f"torch.save ({form}): state dict", WANTED, ())
    torch.save({"model": STATE, "epoch": 4, "optimizer": {"lr": [1]}}, path, **how)
    found = inspect(path)
    assert found.format == f"torch.save ({form}): checkpoint"
    assert found.facts == {"beside it: epoch": "4", "beside it: optimizer": "dict of 1"}


def test_a_whole_module_and_its_tree(tmp_path):
    torch.save(Small(), tmp_path / "m.pt")
    found = inspect(tmp_path / "m.pt")
    assert found.format == "torch.save (zip): module"
    assert found.architecture == f"{Small.__module__}.Small"
    assert found.classes["inner.1"] == "torch.nn.modules.dropout.Dropout"
    assert (found.scalars["width"], found.scalars["inner.1.p"]) == (3, 0.25)
    assert found.recipe[0] == f"use: {Small.__module__}:Small"


def test_what_it_would_have_run_is_told_and_not_run(tmp_path):
    torch.save({"state_dict": STATE, "hook": Called()}, tmp_path / "m.pt")
    found = inspect(tmp_path / "m.pt")
    assert found.calls == ("__builtin__.eval('1 + 1\\x1b[2J')",)
    assert held(found) == WANTED
    assert found.trains.startswith("no: reading it would run what it calls")
    (tmp_path / "bare.pkl").write_bytes(b"cos\nsystem\n(Vtrue\ntR.")
    assert inspect(tmp_path / "bare.pkl").calls == ("os.system('true')",)


def test_gguf(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(mutants.ggufs()[0])
    found = inspect(tmp_path / "m.gguf")
    assert (found.format, found.architecture) == ("GGUF", "llama")
    assert [(t.name, t.dtype, t.shape) for t in found.tensors] == [
        ("token_embd.weight", "F32", (2, 32)),
        ("blk.0.attn_q.weight", "Q8_0", (32,)),
    ]
    assert found.recipe == (f"base: {tmp_path / 'm.gguf'}",)


def test_folders_of_models_and_adapters(tmp_path):
    found = inspect(folder_of(tmp_path / "m", model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=2))
    assert (found.format, found.architecture) == ("model folder, safetensors", "LlamaForCausalLM")
    assert (found.facts, found.trains, held(found)) == ({"model_type": "llama", "hidden_size": "2"}, "yes", WANTED)
    adapter = tmp_path / "a"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "me/base"})
    )
    save_file({"lora_A": torch.ones(8, 2)}, adapter / "adapter_model.safetensors")
    found = inspect(adapter)
    assert (found.format, found.architecture, found.facts["r"]) == ("peft adapter", "LORA", "8")
    assert found.recipe == ("base: me/base",)
    run = folder_of(tmp_path / "run", architectures=["X"])
    (run / "job.resolved.yaml").write_text("model: {}\n")
    assert inspect(run).format == "metier run folder (an unfinished run), model folder, safetensors"
    (run / "metier.json").write_text(json.dumps({"task": "chat", "base": "me/base"}))
    shutil.copytree(adapter, run / "adapter")
    found = inspect(run)
    assert found.format == "metier run folder (a finished run), peft adapter"
    assert found.facts["base"] == "me/base"


def test_a_folder_that_brings_code_says_what_would_let_it_run(tmp_path):
    folder = folder_of(tmp_path / "m", model_type="strange", auto_map={"AutoModel": "modeling_strange.Strange"})
    (folder / "modeling_strange.py").write_text("raise SystemExit\n")
    found = inspect(folder)
    assert found.calls == ("modeling_strange.py",)
    assert found.recipe == (f"base: {folder}", f"trust_code: {code_digest(folder)}")


def test_data_is_known_by_its_first_bytes(tmp_path):
    (tmp_path / "cells").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(20))
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04" + bytes(20))
    assert inspect(tmp_path / "cells").format == "HDF5 (no suffix)"
    assert inspect(tmp_path / "a.npz").format == "numpy (.npz)"


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF", b"PK\x03\x04", b"\x80\x02.", bytes(8) + b"{", b"\x80"])
def test_what_is_no_checkpoint_ends_in_one_message(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        inspect(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)


def test_folders_that_are_none(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError):
            inspect(path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError):
            inspect(tmp_path)


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "metier", "inspect", *words], capture_output=True, text=True, check=False
    )


def test_the_command(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(Small(), path)
    done = command(str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    for said in ("torch.save (zip): module", "2 x 3", "inner.0.weight", "Dropout", "p=0.25", "use: "):
        assert said in done.stdout
    torch.save({"w": Called()}, path)
    done = command(str(path), "--json")
    assert json.loads(done.stdout)["calls"] == ["__builtin__.eval('1 + 1\\x1b[2J')"]
    done = command(str(Path(tmp_path / "absent")))
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
