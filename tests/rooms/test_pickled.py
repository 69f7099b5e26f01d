"""Files of torch.save: honest ones are read to the bit, hostile ones do nothing and end in one of our errors."""

import collections
import contextlib
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from metier.core import ModelError, UnsafeError
from metier.models import pickle_machine, pickled, torch_file

FIXTURE = Path(__file__).parents[3] / "shared" / "fixtures" / "sctranslator"
FORMS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4}}


class Block(nn.Module):
    """A module whose class the reader never sees."""

    def __init__(self, width=4):
        super().__init__()
        self.width, self.rate, self.title, self.nothing = width, 0.5, "块", None
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.twice = self.linear
        self.activation = nn.functional.gelu
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_parameter("absent", None)


def saved(value, path, **how):
    torch.save(value, path, **how)
    return path


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


# ------------------------------------------------------------------------------------------------ honest files


def test_a_state_dict_of_every_type(tmp_path, form):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    state = {f"t.{kind}": (torch.randn(3, 5) * 9).to(kind) for kind in (*kinds, torch.int8, torch.uint8, torch.bool)}
    state |= {"empty": torch.empty(0, 7), "scalar": torch.tensor(2.5), "complex": torch.randn(2, dtype=torch.complex64)}
    base = torch.arange(24.0)
    state |= {"strided": base.view(4, 6)[1:, ::2], "turned": base.view(4, 6).T, "spread": torch.ones(1).expand(9)}
    state |= {"parameter": nn.Parameter(torch.randn(2))}
    found = pickled.read(saved(collections.OrderedDict(state), tmp_path / "m.pt", **form))
    assert found.kind == "state dict"
    same(found.tensors, {name: tensor.detach() for name, tensor in state.items()})


def test_a_whole_module_with_its_tree_and_scalars(tmp_path, form):
    module = nn.Sequential(Block(4), nn.Sequential(Block(3), nn.Dropout(0.1)))
    found = pickled.read(saved(module, tmp_path / "m.pt", **form))
    assert found.kind == "module"
    same(found.tensors, module.state_dict())
    assert found.classes[""] == "torch.nn.modules.container.Sequential"
    assert found.classes["1.0"].endswith(".Block")
    assert found.classes["1.0.norm"] == "torch.nn.modules.batchnorm.BatchNorm1d"
    wanted = {"0.width": 4, "1.0.width": 3, "0.rate": 0.5, "0.title": "块", "0.nothing": None, "1.1.p": 0.1}
    assert wanted.items() <= found.scalars.items()


def test_tied_weights_stay_tied(tmp_path, form):
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    found = pickled.read(saved(module, tmp_path / "m.pt", **form)).tensors
    assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr() != found["a.bias"].data_ptr()


def test_wrappers_for_several_devices_are_taken_off(tmp_path):
    module = Block()
    for value in (nn.DataParallel(module), nn.DataParallel(module).state_dict()):
        found = pickled.read(saved(value, tmp_path / "m.pt"))
        same(found.tensors, module.state_dict())
    assert pickled.read(saved(nn.DataParallel(module), tmp_path / "m.pt")).scalars["width"] == 4


@pytest.mark.parametrize("key", ["net", "model", "state_dict"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_holds_more_than_the_network(tmp_path, form, key, whole):
    module = Block()
    optimizer = torch.optim.Adam(module.parameters(), amsgrad=True)
    module.linear(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    value = {
        key: module if whole else module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 7,
        "odd": Block,
    }
    found = pickled.read(saved(value, tmp_path / "m.pt", **form))
    assert found.kind == "checkpoint"
    same(found.tensors, module.state_dict())
    assert found.others["epoch"] == 7
    moments = found.others["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, optimizer.state_dict()["state"][0]["exp_avg"])
    assert "odd" not in found.others


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="the published network is not at hand")
def test_a_published_module_without_its_classes():
    found = pickled.read(FIXTURE / "sct_random.pt")
    same(found.tensors, load_file(FIXTURE / "sct_random_state_dict.safetensors"))
    assert found.classes["enc"].endswith("scPerformerLM")
    assert (found.scalars["enc.max_seq_len"], found.scalars["enc.pos_emb.num_embeddings"]) == (2000, 85500)


# ------------------------------------------------------------------------------------------------ hostile files


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.made = (function, arguments)

    def __reduce__(self):
        return self.made


def packed(program, path, entries=(), compression=zipfile.ZIP_STORED, root="m"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", program)
        for name, content in entries:
            archive.writestr(f"{root}/{name}", content)
    return path


def call(module, name, argument="x"):
    """A program that calls module.name(argument), by text opcodes."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


DANGEROUS = [
    *(("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("subprocess", "check_output")),
    *(
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "compile"),
        ("builtins", "__import__"),
        ("builtins", "open"),
    ),
    *(("__builtin__", "eval"), ("builtins", "getattr"), ("builtins", "setattr"), ("importlib", "import_module")),
    *(("runpy", "run_path"), ("pty", "spawn"), ("webbrowser", "open"), ("shutil", "rmtree"), ("os", "remove")),
    *(("socket", "create_connection"), ("urllib.request", "urlopen"), ("pickle", "loads"), ("torch", "load")),
    *(("torch.storage", "_load_from_bytes"), ("torch.hub", "load"), ("torch.jit", "load"), ("timeit", "timeit")),
    *(("operator", "attrgetter"), ("operator", "methodcaller"), ("types", "FunctionType"), ("ctypes", "CDLL")),
    *(("code", "interact"), ("pdb", "run"), ("numpy.testing._private.utils", "runstring"), ("builtins", "map")),
    *(("torch._utils", "_rebuild_device_tensor_from_numpy"), ("torch.serialization", "load"), ("sys", "exit")),
]


@pytest.mark.parametrize(("module", "name"), DANGEROUS)
def test_calls_are_refused_by_name(tmp_path, module, name):
    programs = (
        call(module, name),
        f"(V{'x'}\ni{module}\n{name}\n.".encode(),
        f"(c{module}\n{name}\nVx\no.".encode(),
        b"\x80\x04" + _text(module) + _text(name) + b"\x93(" + _text("x") + b"tR.",
        f"c{module}\n{name}\n}}b.".encode(),
    )
    for program in programs:
        for wrapped in (program, b"}(Vstate_dict\n" + program[:-1] + b"u."):
            with pytest.raises(UnsafeError) as caught:
                pickled.read(packed(wrapped, tmp_path / "m.pt"))
            assert f"{module}.{name}" in str(caught.value)
            assert caught.value.exit_code == 77


def _text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


def test_nothing_runs(tmp_path):
    sentinel = tmp_path / "ran"
    for value in (
        Calls(Path.touch, sentinel),
        {"weights": Calls(eval, f"open({str(sentinel)!r}, 'w')")},
        Calls(getattr, Calls(__import__, "os"), "system"),
    ):
        for how in FORMS.values():
            with pytest.raises(UnsafeError):
                pickled.read(saved(value, tmp_path / "m.pt", **how))
    assert not sentinel.exists()


STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI%d\ntQ"
TENSOR = b"}(Vw\nctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"I%d\n(%st(%stI00\nNtRu."


def tensor(count=4, offset=0, sizes=b"I2\nI2\n", strides=b"I2\nI1\n"):
    return TENSOR % (count, offset, sizes, strides)


def test_the_tensor_program_of_these_tests_is_sound(tmp_path):
    data = torch.arange(4.0)
    path = packed(tensor(), tmp_path / "m.pt", [("data/0", data.numpy().tobytes())])
    assert torch.equal(pickled.read(path).tensors["w"], data.view(2, 2))


@pytest.mark.parametrize(
    "program",
    [
        tensor(offset=1),
        tensor(offset=-1),
        tensor(sizes=b"I2\nI-2\n"),
        tensor(sizes=b"I2\nI3\n"),
        tensor(strides=b"I9\nI1\n"),
        tensor(strides=b"I-1\nI1\n"),
        tensor(sizes=b"I2\n"),
        tensor(sizes=b"I99999999999\nI1\n", strides=b"I0\nI0\n"),
        tensor(sizes=b"F2.0\nI2\n"),
        tensor(sizes=b"I01\nI2\n"),
        tensor(count=5),
        tensor(count=3),
        tensor(count=-4),
        tensor(count=10**15),
        tensor(sizes=b"I1\n" * 65, strides=b"I1\n" * 65),
        tensor().replace(b"FloatStorage", b"FloatStorag"),
        tensor().replace(b"FloatStorage", b"DoubleStorage"),
        tensor().replace(b"Vstorage", b"Vpackage"),
        tensor().replace(b"V0\n", b"V../0\n"),
        tensor().replace(b"V0\n", b"I0\n"),
        tensor()[:-1],
        tensor()[:40],
        b"",
        b".",
        b"N.",
        b"}.",
        b"(.",
        b"0.",
        b"t.",
        b"\x80\xff.",
        b"g9\n.",
        b"I" + b"9" * 10_000 + b"\n.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x82\x01.",
        b"\x97.",
        b"Pname\n.",
        b"cos\nsystem\n.",
        b"cos\nsystem\n)\x81.",
        b"cos\nsystem\n)}\x92.",
        b"](2(2(2e.",
        b")" + b"2\x86" * 3000 + b"q\x00}h\x00Ns.",
        b"]" * 100_000 + b".",
        b"(" * 500_000 + b".",
        b"}(" + b"Va\nN" * 400_000 + b"u.",
        b"](" + b"N" * 200_000 + b"eq\x00" + b"0cbuiltins\nlist\n(h\x00tR" * 50_000 + b".",
        b"(" + b"N" * 1_100_000 + b"l.",
        b"ctorch.nn\nModule\n)\x81}(V_modules\n}V_parameters\n}ub.",
        b"ctorch.nn\nModule\n)\x81q\x00}(V_modules\n}Va\nh\x00sV_parameters\n}ub.",
        b"ctorch.nn\nModule\n)\x81}(V_modules\nNV_parameters\n](NeV_buffers\nNub.",
    ],
)
def test_what_no_pickler_writes_ends_in_one_message(tmp_path, program):
    path = packed(program, tmp_path / "m.pt", [("data/0", bytes(16))])
    with pytest.raises(ModelError) as caught:
        pickled.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_archives_that_are_none_of_torchs(tmp_path):
    data, path = bytes(16), tmp_path / "m.pt"
    for build in (
        lambda: packed(tensor(), path, [("data/0", data)], zipfile.ZIP_DEFLATED),
        lambda: packed(tensor(), path, [("data/0", data), ("constants.pkl", b"N.")]),
        lambda: packed(tensor(), path, [("data/0", data), ("byteorder", b"big")]),
        lambda: packed(tensor(), path, [("data/0", data), ("x/data.pkl", tensor())]),
        lambda: packed(tensor(), path, []),
        lambda: path.write_bytes(b"PK\x03\x04" + bytes(99)),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(pickle.dumps(torch_file.LEGACY_MAGIC, 2) + b"I1\n.N." + tensor() + b"]."),
        lambda: path.write_bytes(b"not a model at all"),
        lambda: (path.unlink(), path.mkdir()),
    ):
        build()
        with pytest.raises(ModelError):
            pickled.read(path)


def test_cut_and_changed_files_end_in_our_errors(tmp_path):
    dice = random.Random(0)
    for name, how in FORMS.items():
        whole = saved({"net": Block(), "epoch": 3}, tmp_path / name, **how).read_bytes()
        for _ in range(700):
            data = bytearray(whole)
            for _ in range(dice.choice((1, 1, 2, 8))):
                data[dice.randrange(len(data))] = dice.randrange(256)
            if dice.random() < 0.2:
                del data[dice.randrange(len(data)) :]
            path = tmp_path / "changed.pt"
            path.write_bytes(data)
            with contextlib.suppress(ModelError, UnsafeError):
                assert pickled.read(path).tensors


def test_bare_programs_made_of_random_opcodes(tmp_path):
    dice = random.Random(1)
    opcodes = [
        bytes([code]) for code in b"(.0123FIJKLMNPQRSTUVXabcdeghijloprqstu]})\x80\x81\x85\x86\x87\x88\x89\x8c\x93\x94"
    ]
    ended = collections.Counter()
    for _ in range(4000):
        program = (
            b"".join(dice.choice(opcodes) + dice.choice((b"", b"\x00", b"1\n", b"a b\n")) for _ in range(12)) + b"."
        )
        try:
            pickle_machine.run(program, 0, torch_file.CALLS, lambda _: None)
            ended["value"] += 1
        except (pickle_machine.PickleDamagedError, UnsafeError) as error:
            ended[type(error).__name__] += 1
    assert sum(ended.values()) == 4000
    assert ended["PickleDamagedError"] > 1000


def test_the_legacy_form_is_checked_against_its_own_list(tmp_path):
    whole = saved({"w": torch.arange(4.0)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False).read_bytes()
    at = whole.rindex(struct.pack("<q", 4))
    (tmp_path / "m.pt").write_bytes(whole[:at] + struct.pack("<q", 5) + whole[at + 8 :])
    with pytest.raises(ModelError, match="5 elements instead of 4"):
        pickled.read(tmp_path / "m.pt")
    (tmp_path / "m.pt").write_bytes(whole[:-3])
    with pytest.raises(ModelError):
        pickled.read(tmp_path / "m.pt")
