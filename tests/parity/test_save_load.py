"""What is saved is what was trained: bit for bit, in a fresh process, by metier, by plain transformers and by plain peft."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import metier
from metier.core import ModelError
from metier.run import story

METHODS = {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 4}}
QUESTION = "Message 5: the order 185 came 5 days late"

FRESH = r"""
import json, sys
import peft, torch, transformers
from safetensors.torch import save_file
import metier

torch.set_num_threads(1)
auto = {"causal": transformers.AutoModelForCausalLM, "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "classifier": transformers.AutoModelForSequenceClassification}
found, answers = {}, {}

def put_out(module, ids, head):
    more = {"decoder_input_ids": ids[:, :5]} if head == "seq2seq" else {}
    with torch.inference_mode():
        return module.eval()(input_ids=ids, **more).logits.contiguous()

for case in json.load(open(sys.argv[1])):
    name, ids, head = case["name"], torch.tensor([case["ids"]]), case["head"]
    specialist = metier.load(case["run"])
    found[name + "/metier"] = put_out(specialist.module, ids, head)
    answers[name] = specialist.predict([case["question"]], max_new_tokens=8)
    more = {"num_labels": 3} if head == "classifier" else {}
    if case["method"] == "full":
        plain = auto[head].from_pretrained(case["run"], dtype=torch.float32)
    else:
        base = auto[head].from_pretrained(case["base"], dtype=torch.float32, **more)
        plain = peft.PeftModel.from_pretrained(base, case["run"] + "/adapter")
    # A weight mapped from a file may lie at an odd address, where the same product rounds otherwise in its last bit.
    for parameter in plain.parameters():
        parameter.data = parameter.data.clone()
    found[name + "/plain"] = put_out(plain, ids, head)
    tokenizer = transformers.AutoTokenizer.from_pretrained(case["run"])
    assert tokenizer(case["question"])["input_ids"] == case["ids"], name
    if "merged" in case:
        found[name + "/merged"] = put_out(auto[head].from_pretrained(case["merged"], dtype=torch.float32), ids, head)
save_file(found, sys.argv[2])
print(json.dumps(answers))
"""


def head_of(name: str) -> str:
    return "classifier" if name in tiny.ENCODERS else "seq2seq" if name in tiny.SEQ2SEQ else "causal"


def task_of(name: str) -> str:
    if name in tiny.ENCODERS:
        return "classify"
    return "chat" if name in tiny.CHAT or name in tiny.SEQ2SEQ else "complete"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Every architecture tuned by every method, and what the network in memory put out before it was saved."""
    root = tmp_path_factory.mktemp("parity")
    rows = [(f"Message {i}: the order {i * 37} came {i % 9} days late", ("a", "b", "c")[i % 3]) for i in range(30)]
    (root / "pair.jsonl").write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in rows))
    (root / "class.jsonl").write_text("".join(json.dumps({"text": q, "label": a}) + "\n" for q, a in rows))
    in_memory: dict[str, torch.Tensor] = {}
    cases, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIER_CACHE", str(root / "cache"))
        save = story._save

        def watch(setup, adapted, fitted):
            module, head = adapted.module.eval(), setup.job.head
            ids = torch.tensor([setup.model.tokenizer(QUESTION)["input_ids"]])
            more = {"decoder_input_ids": ids[:, :5]} if head == "seq2seq" else {}
            with torch.inference_mode():
                in_memory[case["name"]] = module(input_ids=ids, **more).logits.clone()
            save(setup, adapted, fitted)

        patch.setattr(story, "_save", watch)
        for name in tiny.NAMES:
            base = tiny.make(name, root / name)
            for method, section in METHODS.items():
                data = "class" if name in tiny.ENCODERS else "pair"
                case = {"name": f"{name}-{method}", "base": str(base), "method": method, "head": head_of(name)}
                case |= {"run": str(root / "runs" / case["name"]), "question": QUESTION}
                cases.append(case)
                merge = method == "lora" and name not in tiny.ENCODERS
                found = metier.train(
                    {
                        "model": {"base": str(base), "device": "cpu"},
                        "data": {"train": str(root / f"{data}.jsonl"), "overlap": "allow"},
                        "task": task_of(name),
                        "method": section,
                        "train": {"max_steps": 2, "batch_size": 8, "learning_rate": 0.05, "evaluations": 1},
                        "evaluate": {"rows": 2, "generate": False, "retention": "off", "baselines": False},
                        "export": {"folder": case["run"], "merge": merge},
                    }
                )
                case["ids"] = found.load().model.tokenizer(QUESTION)["input_ids"]
                if merge:
                    case["merged"] = f"{case['run']}/merged"
    yield {"root": root, "cases": {case["name"]: case for case in cases}, "memory": in_memory}
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fresh(tuned):
    """What a fresh process gets from the same files."""
    root = tuned["root"]
    (root / "cases.json").write_text(json.dumps(list(tuned["cases"].values())))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(root / "cases.json"), str(root / "fresh.safetensors")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {"logits": load_file(root / "fresh.safetensors"), "answers": json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", tiny.NAMES)
class TestFreshProcess:
    def test_tuning_moved_the_network(self, tuned, name, method):
        case = tuned["cases"][f"{name}-{method}"]
        other = tuned["cases"][f"{name}-{'lora' if method == 'full' else 'full'}"]
        assert not torch.equal(tuned["memory"][case["name"]], tuned["memory"][other["name"]])

    def test_metier_gives_the_same_bits(self, tuned, fresh, name, method):
        key = f"{name}-{method}"
        assert torch.equal(fresh["logits"][f"{key}/metier"], tuned["memory"][key])

    def test_plain_libraries_give_the_same_bits(self, tuned, fresh, name, method):
        key = f"{name}-{method}"
        assert torch.equal(fresh["logits"][f"{key}/plain"], tuned["memory"][key])

    def test_answers_are_the_same(self, tuned, fresh, name, method):
        case = tuned["cases"][f"{name}-{method}"]
        assert metier.load(case["run"]).predict([QUESTION], max_new_tokens=8) == fresh["answers"][case["name"]]


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name not in tiny.ENCODERS])
def test_merged_is_the_adapter_on_its_base(tuned, fresh, name):
    merged, adapted = (fresh["logits"][f"{name}-lora/{way}"] for way in ("merged", "metier"))
    # Merging adds the update to the weights before instead of after the product: the same but for rounding.
    assert torch.allclose(merged, adapted, rtol=1e-4, atol=1e-4 * float(adapted.abs().max()))


@pytest.fixture
def copied(tuned, tmp_path):
    """A run and its base at another place, where they can be harmed."""

    def copy(name: str) -> tuple[Path, Path]:
        case = tuned["cases"][name]
        base, run = tmp_path / "base", tmp_path / "run"
        shutil.copytree(case["base"], base)
        shutil.copytree(case["run"], run)
        resolved = run / "job.resolved.yaml"
        resolved.write_text(resolved.read_text().replace(f"base: {case['base']}\n", f"base: {base}\n"))
        assert str(base) in resolved.read_text()
        return base, run

    return copy


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_adapter_finds_its_base_at_another_place(copied, tuned, name):
    _, run = copied(f"{name}-lora")
    assert (
        metier.load(run).model.lineage.fingerprint
        == metier.load(tuned["cases"][f"{name}-lora"]["run"]).model.lineage.fingerprint
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_adapter_on_another_base_of_the_same_shape_is_refused(copied, name):
    from safetensors.torch import save_file

    base, run = copied(f"{name}-lora")
    tensors = load_file(base / "model.safetensors")
    largest = max(tensors, key=lambda key: tensors[key].numel())
    tensors[largest] = tensors[largest] + 0.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not the base that this adapter was trained on") as caught:
        metier.load(run)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("name", "file"), [("llama-lora", "adapter/adapter_model.safetensors"), ("bert-full", "model.safetensors")]
)
def test_damaged_weights_are_an_error_and_no_answer(copied, name, file):
    _, run = copied(name)
    file = run / file
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError):
        metier.load(run)
