"""Headers of safetensors files and indexes of shards: honest ones are read, lying ones end in one message with a place."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from metier.core import ModelError
from metier.models import safetensors_file


def packed(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_an_honest_file(tmp_path):
    kinds = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    state = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds} | {
        "empty": torch.empty(0, 5),
        "one": torch.tensor(1.5),
    }
    save_file(state, tmp_path / "m.safetensors", metadata={"format": "pt"})
    header = safetensors_file.read(tmp_path / "m.safetensors")
    assert header.metadata == {"format": "pt"}
    assert {tensor.name: tensor.shape for tensor in header.tensors} == {
        name: tuple(t.shape) for name, t in state.items()
    }
    assert {tensor.name: tensor.bytes for tensor in header.tensors} == {name: t.nbytes for name, t in state.items()}
    found = safetensors_file.load(tmp_path / "m.safetensors")
    assert all(torch.equal(found[name].view(torch.uint8) if found[name].dim() else found[name],
                           tensor.view(torch.uint8) if tensor.dim() else tensor) for name, tensor in state.items())  # fmt: skip


LIES = {
    "too few": b"\x01\x02",
    "header of 9 exabytes": struct.pack("<Q", 1 << 63) + b"{}",
    "header claims 4 more bytes": packed({"a": entry()}, bytes(8), length=200),
    "no header": packed(b""),
    "no JSON": packed(b'{"a": '),
    "no UTF-8": packed(b'{"\xff": 1}'),
    "a list": packed([1]),
    "a million lists": packed(b"[" + b"[]," * 700_000 + b"[]]"),
    "nested without end": packed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "twice": packed(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', bytes(8)),
    "key twice inside": packed(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "metadata of numbers": packed({"__metadata__": {"a": 1}}),
    "metadata is a list": packed({"__metadata__": []}),
    "entry is null": packed({"a": None}),
    "entry lacks its place": packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "entry says more": packed({"a": entry() | {"more": 1}}, bytes(8)),
    "unknown type": packed({"a": entry("F31")}, bytes(8)),
    "type is a number": packed({"a": entry(32)}, bytes(8)),
    "type is a list": packed({"a": entry(["F32"])}, bytes(8)),
    "shape is a text": packed({"a": entry() | {"shape": "2"}}, bytes(8)),
    "size below zero": packed({"a": entry(shape=(-2,))}, bytes(8)),
    "size is true": packed({"a": entry(shape=(True, 2))}, bytes(8)),
    "size is a float": packed({"a": entry(shape=(2.0,))}, bytes(8)),
    "size is nan": packed(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)),
    "size is absurd": packed({"a": entry(shape=(10**40,))}, bytes(8)),
    "sizes overflow": packed({"a": entry(shape=(1 << 33, 1 << 33))}, bytes(8)),
    "too many axes": packed({"a": entry(shape=(1,) * 65, end=4)}, bytes(4)),
    "larger than its place": packed({"a": entry(shape=(3,))}, bytes(8)),
    "place runs backwards": packed({"a": entry(begin=8, end=0)}, bytes(8)),
    "place below zero": packed({"a": entry(begin=-8, end=0)}, bytes(8)),
    "place of three": packed({"a": entry() | {"data_offsets": [0, 8, 8]}}, bytes(8)),
    "outside the file": packed({"a": entry(begin=8, end=16)}, bytes(8)),
    "overlap": packed({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
    "same place": packed({"a": entry(), "b": entry()}, bytes(8)),
    "gap": packed({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
    "bytes behind": packed({"a": entry()}, bytes(9)),
    "cut off": packed({"a": entry()}, bytes(7)),
    "half a byte": packed({"a": entry("F4", (1,), 0, 1)}, bytes(1)),
}  # fmt: skip


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_lies_end_in_one_message_with_file_and_byte(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        safetensors_file.load(path)
    assert str(caught.value).startswith(f"{path}: byte ")
    assert len(str(caught.value).splitlines()) == 1


def test_there_must_be_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(ModelError, match="no such file"):
            safetensors_file.read(path)


def cut(folder, names=("a", "b", "c"), **told):
    """A model in two shards and the index over them."""
    shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: torch.ones(2) for name in held}, folder / shard)
    said = {name: shard for shard, held in shards.items() for name in held} | told
    (folder / safetensors_file.INDEX).write_text(
        json.dumps({"weight_map": {k: v for k, v in said.items() if v is not None}})
    )
    return folder / safetensors_file.INDEX


def test_shards_and_their_index_agree(tmp_path):
    assert [len(header.tensors) for header in safetensors_file.shards(cut(tmp_path))] == [2, 1]
    safetensors_file.check_folder(tmp_path)


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({"a": "../model-1.safetensors"}, "no file beside it"),
        ({"a": "/etc/passwd"}, "no file beside it"),
        ({"a": ".."}, "no file beside it"),
        ({"a": ""}, "no file beside it"),
        ({"a": "x\\..\\model-1.safetensors"}, "no file beside it"),
        ({"a": "model-3.safetensors"}, "is missing"),
        ({"a": "model-2.safetensors"}, "'a' is in model-1.safetensors, not model-2.safetensors"),
        ({"d": "model-2.safetensors"}, "'d' is in no shard"),
        ({"b": None}, "'b' is in model-1.safetensors, not nowhere"),
        ({"a": 1}, "does not name a file for each tensor"),
    ],
)
def test_an_index_that_lies(tmp_path, told, what):
    index = cut(tmp_path, **told)
    with pytest.raises(ModelError) as caught:
        safetensors_file.check_folder(tmp_path)
    assert what in str(caught.value)
    assert str(caught.value).startswith(str(index))


def test_a_tensor_in_two_shards(tmp_path):
    with pytest.raises(ModelError, match=r"'a' is in model-1.safetensors and in model-2.safetensors"):
        safetensors_file.shards(cut(tmp_path, names=("a", "b", "a")))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}', "[" * 100_000]
)
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / safetensors_file.INDEX).write_text(text)
    with pytest.raises(ModelError):
        safetensors_file.check_folder(tmp_path)
