"""What every method promises, for every tiny family: what moves, what stays, and that adapters travel.

Shapes: B rows, T tokens.
"""

import copy
import importlib
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from metier import models
from metier.adapt import adapt, beside, load_adapter, lora, merged, save_adapter, wrapped_base
from metier.core import ModelError, RecipeError, StorageError
from metier.data.records import Completion, Document, Labelled
from metier.models import structure
from metier.models.saving import save as save_model
from metier.recipe import ChatTask, ClassifyTask, CompleteTask, FreezeMethod, FullMethod, LoRAMethod, ModelSection
from metier.tasks import build
from metier.training import Precision, train_step

LABELS = ("billing", "delivery", "其他")
HEADS = dict.fromkeys(tiny.CAUSAL, "causal") | dict.fromkeys(tiny.ENCODERS, "classifier") | {"t5": "seq2seq"}
LORAS = {variant: LoRAMethod(rank=4, variant=variant) for variant in ("lora", "rslora", "dora")}
METHODS = {"full": FullMethod(), **{f"freeze-{n}": FreezeMethod(blocks=n) for n in range(3)}, **LORAS}

Conv1D = importlib.import_module("transformers.pytorch_utils").Conv1D

# Facts of the families, written down here and not asked of the code under test.
BLOCKS = (
    dict.fromkeys(("qwen3", "llama", "gemma3", "mistral"), "model.layers")
    | {"gpt2": "transformer.h", "t5": "decoder.block"}
    | {"bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer"}
)
COUNT = dict.fromkeys(tiny.NAMES, 2) | {"gemma3": 3}
TIED = {"qwen3", "gemma3", "gpt2", "t5"}
HEAD = dict.fromkeys(("llama", "mistral"), ("lm_head.",)) | {
    "bert": ("classifier.", "bert.pooler."),
    "roberta": ("classifier.",),
}
LINEARS_PER_BLOCK = (
    dict.fromkeys(("qwen3", "llama", "gemma3", "mistral"), 7) | {"gpt2": 4} | dict.fromkeys(tiny.ENCODERS, 6)
)

every_name = pytest.mark.parametrize("name", tiny.NAMES)
every_lora = pytest.mark.parametrize("variant", LORAS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with two rows to learn and a batch of both; loaded once, to be copied before it is changed."""
    seen = {}

    def prepare(name):
        if name not in seen:
            folder = tiny.make(name, tmp_path_factory.mktemp("tiny") / name)
            model = models.load(ModelSection(base=str(folder)), head=HEADS[name], labels=LABELS)
            section, rows = _lesson(HEADS[name])
            task = build(section, model.tokenizer, head=model.head, labels=LABELS, context=tiny.CONTEXT, seed=0)
            batch = task.collate(task.encode(rows, training=True))
            seen[name] = SimpleNamespace(model=model, task=task, batch=batch, new=model.new, head=model.head)
        return seen[name]

    return prepare


def _lesson(head):
    if head == "classifier":
        return ClassifyTask(), [
            Labelled("a:1", "charged twice", "billing"),
            Labelled("a:2", "where is my parcel?", "delivery"),
        ]
    if head == "seq2seq":
        return ChatTask(), [
            Completion("a:1", "charged twice", "refund it"),
            Completion("a:2", "where?", "near the door"),
        ]
    return CompleteTask(), [Document("a:1", "The cat sat on the mat."), Document("a:2", "我的包裹还没有到。")]


def adapted(found, method):
    torch.manual_seed(3)
    module = copy.deepcopy(found.model.module)
    return adapt(module, method, head=found.head, base_name="tiny", new=found.new)


def logits(found, module):
    """What the network answers to the batch, in evaluation mode."""
    given = {name: found.batch[name] for name in ("input_ids", "attention_mask") if name in found.batch}
    if found.head == "seq2seq":
        given = {"input_ids": found.batch["ids"], "attention_mask": found.batch["mask"]}
        given["decoder_input_ids"] = found.batch["ids"]
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    with torch.inference_mode():
        return module.eval()(**given).logits.clone()


def step(found, module, steps=2):
    """Some steps of plain gradient descent."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    precision = Precision("fp32", torch.device("cpu"))
    for _ in range(steps):
        train_step(module, found.task, [found.batch], optimizer, precision=precision, max_grad_norm=10.0)


def state(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.is_floating_point() else tensor


def may_move(name, method, parameter):
    """Whether the method promises that this parameter moves, by its name alone."""
    if method == "full":
        return True
    heads = HEAD.get(name, ())
    if method.startswith("freeze"):
        last = range(COUNT[name] - int(method[-1]), COUNT[name])
        return parameter.startswith((*heads, *(f"{BLOCKS[name]}.{i}." for i in last)))
    plain = parameter.removeprefix("base_model.model.")
    return "lora_" in plain or (plain.startswith(heads) and ".modules_to_save." in plain if heads else False)


# ------------------------------------------------------------------------------------------------ what moves


@every_name
@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_names_moves(base, name, method):
    found = base(name)
    if method == "freeze-0" and name in TIED:
        with pytest.raises(RecipeError, match="nothing would move"):
            adapted(found, METHODS[method])
        return
    result = adapted(found, METHODS[method])
    before = state(result.module)
    step(found, result.module)
    promised = {p for p, _ in result.module.named_parameters() if may_move(name, method, p)}
    assert {p for p, parameter in result.module.named_parameters() if parameter.requires_grad} == promised
    assert promised
    changed = {
        key for key, tensor in result.module.state_dict().items() if not torch.equal(bits(tensor), bits(before[key]))
    }
    tied = (
        {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} if method == "full" else set()
    )
    assert changed <= promised | tied
    # A key's bias has no influence on attention, so not every promise can be kept.
    assert len(changed) >= 0.7 * len(promised)


@every_name
@pytest.mark.parametrize("method", METHODS)
def test_what_moves_is_counted_once(base, name, method):
    found = base(name)
    if method == "freeze-0" and name in TIED:
        pytest.skip("nothing moves")
    result = adapted(found, METHODS[method])
    moving = [p for p in result.module.parameters() if p.requires_grad]
    assert result.moved == sum(p.numel() for p in moving) == sum(count for _, _, count in result.patterns())
    assert result.total == sum(p.numel() for p in result.module.parameters())
    assert sum(tensors for _, tensors, _ in result.patterns()) == len(moving)
    assert [count for _, _, count in result.patterns()] == sorted((c for _, _, c in result.patterns()), reverse=True)
    assert not any(".0." in pattern or ".1." in pattern for pattern, _, _ in result.patterns())


@every_name
@every_lora
def test_lora_has_as_many_parameters_as_the_formula_says(base, name, variant):
    found = base(name)
    wanted = 0
    for path, layer in found.model.module.named_modules():
        inside = isinstance(layer, nn.Linear | Conv1D) and not path.startswith(("lm_head", "classifier", "bert.pooler"))
        if inside:
            outputs, inputs = layer.weight.shape
            wanted += 4 * (inputs + outputs)
            # DoRA learns the size of each output's weights: a Conv1D stores them as columns.
            wanted += (inputs if isinstance(layer, Conv1D) else outputs) * (variant == "dora")
    for path, parameter in found.model.module.named_parameters():
        wanted += parameter.numel() * (name in tiny.ENCODERS and path.startswith(HEAD[name]))
    result = adapted(found, LORAS[variant])
    assert result.moved == wanted
    if name != "t5":
        low = [path for path, _ in result.module.named_parameters() if "lora_A" in path]
        assert len(low) == LINEARS_PER_BLOCK[name] * COUNT[name]


@pytest.mark.parametrize("name", tiny.ENCODERS)
@every_lora
def test_the_head_of_a_classifier_moves_with_lora_and_is_stored(base, name, variant, tmp_path):
    from safetensors.torch import load_file

    found = base(name)
    result = adapted(found, LORAS[variant])
    before = state(result.module)
    step(found, result.module)
    after = state(result.module)
    heads = [key for key in after if ".modules_to_save." in key]
    assert {key.split(".modules_to_save.")[0].removeprefix("base_model.model.") for key in heads} == {
        prefix.rstrip(".") if prefix != "bert.pooler." else "bert.pooler.dense" for prefix in HEAD[name]
    }
    assert all(not torch.equal(before[key], after[key]) for key in heads)
    save_adapter(result.module, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for key in heads:
        plain = key.replace(".modules_to_save.default", "")
        assert torch.equal(stored[plain], after[key]), sorted(stored)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_a_language_models_head_stays_under_lora(base, name):
    result = adapted(base(name), LoRAMethod(rank=2))
    assert not any(
        p.requires_grad for path, p in result.module.named_parameters() if "lm_head" in path or "embed" in path
    )
    assert not any("modules_to_save" in path for path, _ in result.module.named_parameters())


# ------------------------------------------------------------------------------------------------ freeze


@pytest.mark.parametrize("name", sorted(TIED))
def test_a_tied_head_stays_under_freeze(base, name):
    found = base(name)
    result = adapted(found, FreezeMethod(blocks=1))
    assert structure.is_tied(result.module)
    assert not result.module.get_output_embeddings().weight.requires_grad
    assert "shares its weight" in result.notes[0]
    assert "head" not in result.method


def test_an_untied_head_moves_under_freeze(base):
    result = adapted(base("llama"), FreezeMethod(blocks=0))
    assert result.method == "last 0 of 2 blocks and the head"
    assert [path for path, p in result.module.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert not result.notes


@every_name
def test_more_blocks_than_there_are_are_refused(base, name):
    with pytest.raises(RecipeError, match=f"the network has {COUNT[name]} blocks, 9 were asked for") as caught:
        adapted(base(name), FreezeMethod(blocks=9))
    assert caught.value.faults[0].where == "method.blocks"
    assert caught.value.faults[0].hint == f"choose at most {COUNT[name]}"


# ------------------------------------------------------------------------------------------------ low rank


@every_name
@every_lora
def test_lora_changes_nothing_before_the_first_step(base, name, variant):
    found = base(name)
    before = logits(found, copy.deepcopy(found.model.module))
    after = logits(found, adapted(found, LORAS[variant]).module)
    if variant == "dora":
        # Each weight column is divided by its length and multiplied by it again.
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)


@every_name
@every_lora
def test_merging_changes_no_answer(base, name, variant):
    found = base(name)
    module = adapted(found, LORAS[variant]).module
    step(found, module, steps=3)
    apart = logits(found, module)
    assert not torch.allclose(apart, logits(found, copy.deepcopy(found.model.module)), atol=1e-3)
    names = {path for path, _ in found.model.module.named_parameters()}
    one = merged(module)
    assert {path for path, _ in one.named_parameters()} == names
    torch.testing.assert_close(logits(found, one), apart, rtol=1e-5, atol=1e-5)


@every_name
@every_lora
def test_an_adapter_loads_in_plain_peft_with_the_same_bits(base, name, variant, tmp_path):
    from peft import PeftModel

    found = base(name)
    module = adapted(found, LORAS[variant]).module
    step(found, module)
    tuned = logits(found, module)
    save_adapter(module, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    theirs = PeftModel.from_pretrained(copy.deepcopy(found.model.module), str(tmp_path))
    assert torch.equal(logits(found, theirs), tuned)
    ours = load_adapter(copy.deepcopy(found.model.module), tmp_path)
    assert not ours.training
    assert torch.equal(logits(found, ours), tuned)
    assert theirs.peft_config["default"].base_model_name_or_path == "tiny"


@every_name
def test_adapters_beside_one_base_load_in_plain_peft_each_from_its_own_folder(base, name, tmp_path):
    from peft import PeftModel

    found = base(name)
    shared = copy.deepcopy(found.model.module)
    before = {path: tensor.clone() for path, tensor in shared.state_dict().items()}
    moves = {path: p.requires_grad for path, p in shared.named_parameters()}
    methods = {"lora": LORAS["lora"], "rslora": LoRAMethod(rank=2, variant="rslora"), "dora": LORAS["dora"]}
    tuned = {}
    for arm, method in methods.items():
        torch.manual_seed(3)
        module = beside(shared, method, head=found.head, base_name="tiny", new=found.new).module
        step(found, module)
        tuned[arm] = logits(found, module)
        save_adapter(module, tmp_path / arm)
    for method in (FullMethod(), FreezeMethod(blocks=1)):
        step(found, beside(shared, method, head=found.head, new=found.new).module)
    assert all(torch.equal(tensor, before[path]) for path, tensor in shared.state_dict().items())
    assert {path: p.requires_grad for path, p in shared.named_parameters()} == moves
    for arm, wanted in tuned.items():
        theirs = PeftModel.from_pretrained(copy.deepcopy(found.model.module), str(tmp_path / arm))
        assert torch.equal(logits(found, theirs), wanted)


@pytest.mark.parametrize("name", ["llama", "roberta", "t5"])
def test_a_merged_model_is_loaded_by_plain_transformers(base, name, tmp_path):
    import transformers

    found = base(name)
    module = adapted(found, LoRAMethod(rank=2)).module
    step(found, module)
    model = found.model.with_module(merged(module))
    save_model(model, tmp_path)
    auto = {
        "llama": "AutoModelForCausalLM",
        "roberta": "AutoModelForSequenceClassification",
        "t5": "AutoModelForSeq2SeqLM",
    }
    theirs = getattr(transformers, auto[name]).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(found, theirs), logits(found, model.module), rtol=1e-6, atol=1e-6)


@every_name
@every_lora
def test_the_saved_targets_hit_the_linear_layers_of_the_blocks_and_no_other(base, name, variant):
    found = base(name)
    module = adapted(found, LORAS[variant]).module
    hit = {path.removeprefix("base_model.model.") for path, child in module.named_modules() if hasattr(child, "lora_A")}
    stacks = (BLOCKS[name], "encoder.block")
    assert hit == {
        path
        for path, layer in found.model.module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and path.startswith(stacks)
    }


def test_last_words_stand_for_layers_only_where_they_hit_no_other():
    wanted = ["encoder.0.dense", "encoder.1.dense"]
    assert lora.shortest(wanted, [*wanted, "encoder.0", "head.out"]) == ["dense"]
    assert lora.shortest(wanted, [*wanted, "classifier.dense"]) == wanted


def test_robertas_head_is_not_hit_by_the_layers_of_its_blocks(base):
    targets = adapted(base("roberta"), LoRAMethod(rank=2)).module.peft_config["default"].target_modules
    assert "dense" not in targets
    assert not any("classifier" in target for target in targets)
    assert set(adapted(base("llama"), LoRAMethod(rank=2)).module.peft_config["default"].target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


@pytest.mark.parametrize("name", tiny.CHAT)
def test_layers_are_targeted_by_the_end_of_their_name(base, name):
    result = adapted(base(name), LoRAMethod(rank=2, targets=("q_proj", "v_proj")))
    hit = {path.rsplit(".", 1)[-1] for path, child in result.module.named_modules() if hasattr(child, "lora_A")}
    assert hit == {"q_proj", "v_proj"}
    assert result.method == "LoRA, rank 2, alpha 32, q_proj, v_proj"


def test_one_layer_is_targeted_by_its_full_name_or_part_of_it(base):
    for target in ("model.layers.1.self_attn.q_proj", "1.self_attn.q_proj"):
        module = adapted(base("llama"), LoRAMethod(rank=2, targets=(target,))).module
        hit = [path for path, child in module.named_modules() if hasattr(child, "lora_A")]
        assert hit == ["base_model.model.model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("name", "target", "meant"),
    [
        ("gpt2", "q_proj", "c_attn"),
        ("bert", "q_proj", "query"),
        ("roberta", "v_proj", "value"),
        ("t5", "k_proj", "k"),
        ("llama", "query", "q_proj"),
        ("llama", "qproj", "q_proj"),
        ("llama", "lm_head", None),
        ("gpt2", "mlp.c_fcc", "c_fc"),
    ],
)
def test_an_unknown_target_is_refused_naming_what_there_is(base, name, target, meant):
    with pytest.raises(RecipeError) as caught:
        adapted(base(name), LoRAMethod(targets=(target,)))
    (fault,) = caught.value.faults
    assert (fault.where, fault.what) == ("method.targets", f"{target!r} matches no linear layer")
    if meant:
        assert fault.hint.startswith(f"did you mean {meant}? Layers here: ")
    known = {path.rsplit(".", 1)[-1] for path, _ in structure.linears(base(name).model.module)}
    assert fault.hint.endswith(", ".join(sorted(known)))


def test_every_unknown_target_is_told_at_once(base):
    with pytest.raises(RecipeError) as caught:
        adapted(base("llama"), LoRAMethod(targets=("q_proj", "qq", "proj_v")))
    assert [fault.what.split("'")[1] for fault in caught.value.faults] == ["qq", "proj_v"]


def test_no_target_at_all_is_refused(base):
    with pytest.raises(RecipeError, match=r"method\.targets: no layer is left"):
        adapted(base("llama"), LoRAMethod(targets=()))
    # A pooler that no checkpoint held moves whole, so there is nothing left to add an update to.
    with pytest.raises(RecipeError, match=r"method\.targets: no layer is left"):
        adapted(base("bert"), LoRAMethod(targets=("pooler.dense",)))


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    save_adapter(adapted(base("llama"), LoRAMethod(rank=2)).module, tmp_path)
    with pytest.raises(ModelError, match="does not fit this base") as caught:
        load_adapter(copy.deepcopy(base("gpt2").model.module), tmp_path)
    assert "adapter_config.json" in caught.value.faults[0].hint


def test_a_damaged_adapter_is_refused(base, tmp_path):
    save_adapter(adapted(base("llama"), LoRAMethod(rank=2)).module, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="adapter"):
        load_adapter(copy.deepcopy(base("llama").model.module), tmp_path)


def test_an_adapter_that_cannot_be_written_is_a_storage_error(base, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        save_adapter(adapted(base("llama"), LoRAMethod(rank=2)).module, tmp_path / "file" / "adapter")


@pytest.mark.parametrize(("variant", "title"), [("lora", "LoRA"), ("rslora", "rsLoRA"), ("dora", "DoRA")])
def test_a_method_is_told_in_one_line(base, variant, title):
    result = adapted(base("llama"), LORAS[variant])
    assert result.method == f"{title}, rank 4, alpha 32, every linear layer but the head"


def test_scale_follows_the_variant(base):
    for variant, scale in (("lora", 32 / 4), ("rslora", 32 / 2), ("dora", 32 / 4)):
        module = adapted(base("llama"), LORAS[variant]).module
        layer = module.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert layer.scaling["default"] == scale


# ------------------------------------------------------------------------------------------------ plain modules


class Plain(nn.Module):
    """A network that transformers knows nothing of."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


def test_plain_modules_are_adapted_too():
    plain = Plain()
    x = torch.randn(4, 6)
    before = plain(x)
    result = adapt(copy.deepcopy(plain), LoRAMethod(rank=2, targets=("out", "layers.1")))
    assert torch.equal(result.module(x), before)
    assert result.moved == 2 * (6 + 6) + 2 * (6 + 2)
    assert isinstance(wrapped_base(result.module), Plain)
    frozen = adapt(copy.deepcopy(plain), FreezeMethod(blocks=2))
    assert {path for path, p in frozen.module.named_parameters() if p.requires_grad} == {
        f"layers.{i}.{part}" for i in (1, 2) for part in ("weight", "bias")
    }
    assert wrapped_base(plain) is plain


def test_numbers_that_are_no_floats_never_move():
    plain = Plain()
    plain.register_parameter("counts", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    result = adapt(plain, FullMethod())
    assert not plain.counts.requires_grad
    assert result.moved == result.total - 2
