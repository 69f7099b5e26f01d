"""The recipe room: everything that may be said is documented, everything else is refused with its place and a way out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from metier import recipe as room
from metier.core import RecipeError
from metier.recipe import Recipe, Section, dump, json_schema, load, parse
from metier.recipe.section import KindOrWord

MINIMAL = "model: {base: demo}\ndata: {train: a.jsonl}\ntask: chat\n"
RECIPES = Path(__file__).parents[2] / "recipes"
MOST_FIELDS = 15


def sections():
    """Every class of the recipe, the whole first."""
    named = (getattr(room, name) for name in room.__all__)
    return [part for part in named if isinstance(part, type) and issubclass(part, Section) and part is not Section]


@pytest.fixture
def write(tmp_path):
    """Write a recipe file; text or bytes."""

    def put(content, name="job.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


@pytest.fixture
def refused(write):
    """The faults with which a recipe is refused."""

    def faults(content, *overrides):
        with pytest.raises(RecipeError) as caught:
            load(write(content), overrides)
        assert caught.value.exit_code == 2
        return caught.value.faults

    return faults


# ------------------------------------------------------------------------------------------------ what may be said


def test_three_lines_are_enough(write):
    recipe = load(write(MINIMAL))
    assert (recipe.model.base, recipe.data.train, recipe.task.kind) == ("demo", "a.jsonl", "chat")
    assert (recipe.method.kind, recipe.method.rank) == ("lora", 16)
    assert recipe.train.schedule.kind == "linear"


def test_a_word_stands_for_a_section_of_that_kind(write):
    said = load(write(f"{MINIMAL}method: full\ntrain: {{schedule: cosine, optimizer: adam}}\n"))
    assert said.method == room.FullMethod()
    assert said.train.schedule == room.Cosine()
    assert said.train.optimizer == room.Adam()
    assert said == load(
        write(f"{MINIMAL}method: {{kind: full}}\n"), ["train.schedule.kind=cosine", "train.optimizer=adam"]
    )


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("train.learning_rate=2e-4", "train.learning_rate", 2e-4),
        ("train.learning_rate=auto", "train.learning_rate", "auto"),
        ("train.epochs=1", "train.epochs", 1.0),
        ("train.max_steps=null", "train.max_steps", None),
        ("train.optimizer.betas=[0.8, 0.9]", "train.optimizer.betas", (0.8, 0.9)),
        ("method=full", "method", room.FullMethod()),
        ("method={kind: freeze, blocks: 1}", "method.blocks", 1),
        ("method.rank=8", "method.rank", 8),
        ("method.targets=[q_proj, v_proj]", "method.targets", ("q_proj", "v_proj")),
        ("data.columns.prompt=question", "data.columns", {"prompt": "question"}),
        ("data.validation=0.2", "data.validation", 0.2),
        ("data.validation=held.jsonl", "data.validation", "held.jsonl"),
        ("evaluate.generate=false", "evaluate.generate", False),
        ("task.system=a = b", "task.system", "a = b"),
        ("data.validation=5e-2", "data.validation", 0.05),
        ("data.validation=2024-99-99", "data.validation", "2024-99-99"),
        ("train.schedule.warmup=0.5", "train.schedule", room.Linear(warmup=0.5)),
        ("task.system=请用中文", "task.system", "请用中文"),
        ("task.system=[", "task.system", "["),
        ("task.system=", "task.system", None),
    ],
)
def test_an_override_reaches_its_field(write, override, place, value):
    found = load(write(MINIMAL), [override])
    for word in place.split("."):
        found = getattr(found, word)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_the_file_stays(write):
    path = write(MINIMAL)
    recipe = load(path, ["train.epochs=1", "method=full", "train.epochs=2", "method=lora", "method.rank=4"])
    assert (recipe.train.epochs, recipe.method) == (2.0, room.LoRAMethod(rank=4))
    assert path.read_text() == MINIMAL
    # A whole section given after one of its fields replaces the field.
    assert load(path, ["train.epochs=1", "train={batch_size: 2}"]).train == room.TrainSection(batch_size=2)


def test_a_mapping_is_left_as_it_was():
    tree = {"model": {"base": "demo"}, "data": {"train": "a.jsonl"}, "task": "chat"}
    before = json.dumps(tree)
    assert parse(tree, ["model.base=other", "task.system=Hi"]).model.base == "other"
    assert json.dumps(tree) == before


def test_a_recipe_cannot_be_changed_after_it_was_read():
    recipe = parse(yaml.safe_load(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 9


def test_a_byte_order_mark_is_no_fault(write):
    assert load(write(b"\xef\xbb\xbf" + MINIMAL.encode())) == load(write(MINIMAL))
    assert load(write(MINIMAL.replace("\n", "\r\n"))) == load(write(MINIMAL))


# ------------------------------------------------------------------------------------------------ what is refused

WRONG = [
    ("train: {learning_rat: 1}", 4, "unknown key train.learning_rat", "did you mean learning_rate?"),
    ("trian: {}", 4, "unknown key trian", "did you mean train?"),
    ("method: {kind: lora, blocks: 2}", 4, "unknown key method.blocks", "keys here: kind, rank, alpha"),
    ("method: {kind: full, rank: 2}", 4, "unknown key method.rank", "keys here: kind"),
    (
        "train:\n  optimizer:\n    kind: adam\n    amsgrat: true",
        7,
        "unknown key train.optimizer.amsgrat",
        "did you mean amsgrad?",
    ),
    ("method: loar", 4, "method has no known kind", "did you mean lora?"),
    ("method: {blocks: 4}", 4, "unknown key method.blocks", "keys here: kind, rank"),
    ("train: {schedule: {kind: cosin}}", 4, "train.schedule has no known kind", "did you mean cosine?"),
    ("train: {epochs: many}", 4, "train.epochs is 'many'", "valid number"),
    ("train: {epochs: 0}", 4, "train.epochs is 0", "greater than 0"),
    ("train: {epochs: .nan}", 4, "train.epochs is nan", "finite number"),
    ("train: {learning_rate: .inf}", 4, "train.learning_rate is inf", "finite number"),
    ("train: {learning_rate: -1}", 4, "train.learning_rate is -1", "greater than or equal to 0"),
    ("train: {batch_size: 1.5}", 4, "train.batch_size is 1.5", "valid integer"),
    ("train: {precision: fp16}", 4, "train.precision is 'fp16'", "did you mean bf16?"),
    (
        "train: {optimizer: {kind: adamw, betas: [0.9]}}",
        4,
        "train.optimizer.betas has too few values",
        "one more than 1",
    ),
    ("train: {optimizer: {kind: adamw, betas: [0.9, 1.0]}}", 4, "train.optimizer.betas.1 is 1.0", "less than 1"),
    (
        "train: {optimizer: {kind: adam, betas: [-0.1, 0.9]}}",
        4,
        "train.optimizer.betas.0 is -0.1",
        "greater than or equal to 0",
    ),
    (
        "train: {optimizer: {kind: adamw, weight_decay: -1}}",
        4,
        "train.optimizer.weight_decay is -1",
        "greater than or equal to 0",
    ),
    ("train: 3", 4, "train is 3", "it should be a valid mapping"),
    ("train:", 4, "train is None", "it should be a valid mapping"),
    ("method: [lora]", 4, "method is ['lora']", "it should be a valid mapping"),
    ("evaluate: {1: x}", 4, "YAML does not take the key evaluate.1 for text", "put it in quotes"),
    ("evaluate: {rows: 3, no: 4}", 4, "YAML does not take the key evaluate.no for text", "put it in quotes"),
    ("train: {learning_rate: fast}", 4, "train.learning_rate is 'fast'", "auto, or it should be a valid number"),
    ("method: {kind: lora, targets: q_proj}", 4, "method.targets is 'q_proj'", "auto, or it should be a valid list"),
    ("method: {kind: lora, rank: 0}", 4, "method.rank is 0", "greater than or equal to 1"),
    ("method:\n  kind: lora\n  targets:\n  - q_proj\n  - [1]", 6, "method.targets is ['q_proj', [1]]", "auto"),
    ("evaluate: {generate: perhaps}", 4, "evaluate.generate is 'perhaps'", "valid boolean"),
    ("export: {language: english}", 4, "export.language is 'english'", "one of en, zh"),
    ("5: {}", 4, "YAML does not take the key 5 for text", "put it in quotes"),
]


@pytest.mark.parametrize(("said", "line", "what", "hint"), WRONG, ids=[case[0].replace("\n", " ") for case in WRONG])
def test_each_fault_names_its_line_and_a_way_out(refused, tmp_path, said, line, what, hint):
    faults = refused(f"{MINIMAL}{said}\n")
    assert faults[0].where == f"{tmp_path / 'job.yaml'}:{line}"
    assert what in faults[0].what
    assert hint in faults[0].hint
    assert faults[0].hint


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.epoch=3", "unknown key train.epoch"),
        ("method.rank=x", "method.rank is 'x'"),
        ("train.schedule=cosin", "train.schedule has no known kind"),
        ("train=3", "train is 3"),
    ],
)
def test_a_fault_of_an_override_names_the_override(refused, override, what):
    (fault,) = refused(f"{MINIMAL}method: lora\n", override)
    assert fault.where == f"override {override!r}"
    assert what in fault.what


@pytest.mark.parametrize("override", ["train.epochs", "=3", " =3", ""])
def test_an_override_without_a_key_or_a_value_is_refused(refused, override):
    (fault,) = refused(MINIMAL, override)
    assert (fault.where, fault.what) == (f"override {override!r}", "an override is section.key=value")


@pytest.mark.parametrize("override", ["train..epochs=3", ".=3", "epochs=3", "task.labels=2020-99-99"])
def test_an_override_into_nowhere_is_refused(refused, override):
    faults = refused(MINIMAL, override)
    assert any(override in fault.where for fault in faults)


def test_all_faults_are_told_at_once(refused):
    said = "model: {}\ndata: {train: '', validation: 0.1, tset: x}\ntask: chta\nmethod: {kind: lora, rank: -1, alpha: 0}\ntrain:\n  epochs: x\n"
    told = {fault.what: fault.where.rsplit(":", 1)[-1] for fault in refused(said)}
    assert {what.split(" ")[-1] if "unknown" in what else what.split(" ")[0]: line for what, line in told.items()} == {
        "model.base": "1",
        "data.train": "2",
        "data.tset": "2",
        "task": "3",
        "method.rank": "4",
        "method.alpha": "4",
        "train.epochs": "6",
    }


def test_a_missing_section_is_named_with_its_meaning(refused):
    faults = refused("model: {base: demo}\n")
    assert [fault.what for fault in faults] == ["data is missing", "task is missing"]
    assert "chat, complete, classify, cells or own" in faults[1].hint


def test_a_key_that_stands_twice_is_refused(refused, tmp_path):
    path = tmp_path / "job.yaml"
    (one, two) = refused(f"{MINIMAL}train:\n  epochs: 1\n  batch_size: 2\n  epochs: 2\ntask: chat\n")
    assert (one.where, two.where) == (f"{path}:7", f"{path}:8")
    assert one.what == f"train.epochs stands twice, first at {path}:5"


def test_aliases_are_not_read(refused):
    (fault,) = refused(f"{MINIMAL}export: &a {{folder: x}}\nevaluate: *a\n")
    assert "aliases" in fault.what
    # Nine lines of aliases would otherwise unfold to a gigabyte.
    bomb = "a: &a [x,x,x]\n" + "".join(
        f"{b}: &{b} [*{a},*{a},*{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    assert "aliases" in refused(bomb)[0].what


NOT_YAML = {
    "indentation": ("model:\n  base: a\n base: b\n", 3),
    "quote": ('model: "a\n', None),
    "tab": ("model:\n\tbase: a\n", 2),
    "tag": ("model: !!python/object/apply:os.getcwd []\n", 1),
    "two documents": ("model: {}\n---\nmodel: {}\n", None),
    "list as key": ("? [a]\n: b\n", 1),
    "control character": ("model: \x07\n", None),
    "impossible date": ("model: {base: 2020-99-99}\n", None),
    "huge number": (f"train: {{epochs: {'9' * 5000}}}\n", None),
}


@pytest.mark.parametrize("name", NOT_YAML)
def test_what_is_not_yaml_is_refused_where_it_stops_being_yaml(refused, name):
    text, line = NOT_YAML[name]
    (fault,) = refused(text)
    assert fault.what.startswith("not YAML"), fault
    assert "job.yaml" in fault.where
    if line:
        assert fault.where.endswith(f":{line}"), fault


def test_deep_nesting_is_refused_at_once(refused):
    (fault,) = refused(f"{MINIMAL}method: {'[' * 100_000}\n")
    assert (fault.what, fault.where.rsplit(":", 1)[-1]) == ("nested deeper than 20 levels", "4")


def test_a_task_without_a_kind_is_told_the_kinds(refused):
    (fault,) = refused(MINIMAL.replace("task: chat", "task: {max_tokens: 9}"))
    assert (fault.what, fault.hint) == ("task has no known kind", "one of chat, complete, classify, cells, own")


def test_a_section_without_a_kind_is_of_the_usual_one(write):
    said = load(
        write(f"{MINIMAL}method: {{rank: 4}}\ntrain: {{schedule: {{warmup: 0.5}}, optimizer: {{weight_decay: 0}}}}\n")
    )
    assert said.method == room.LoRAMethod(rank=4)
    assert said.train == room.TrainSection(schedule=room.Linear(warmup=0.5), optimizer=room.AdamW(weight_decay=0))


def test_the_usual_kind_is_the_default_kind():
    for section in sections():
        for name, field in section.model_fields.items():
            (usual,) = [part.usual for part in field.metadata if isinstance(part, KindOrWord)] or [None]
            if usual is not None:
                assert usual == field.default.kind, f"{section.__name__}.{name}"
    assert Recipe.model_fields["method"].metadata


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "---\n", "- a\n- b\n", "just words\n", "3\n"])
def test_what_is_not_a_mapping_is_refused(refused, text):
    (fault,) = refused(text)
    assert fault.what == "a recipe is a mapping of sections"
    assert "metier init" in fault.hint


def test_an_empty_mapping_lacks_three_sections(refused):
    assert [fault.what for fault in refused("{}")] == ["model is missing", "data is missing", "task is missing"]


@pytest.mark.parametrize("content", [MINIMAL.encode("utf-16"), "task: 中文".encode("gbk"), b"\x80\x04\x95 pickle"])
def test_what_is_not_utf8_is_refused(refused, content):
    (fault,) = refused(content)
    assert fault.what.startswith("not UTF-8 at byte")


def test_a_file_of_two_mebibytes_is_refused_unread(refused):
    (fault,) = refused(b"#" * (2 << 20))
    assert fault.what == "larger than 1 MiB"


def test_a_folder_and_a_missing_file_are_refused(tmp_path, write):
    write(MINIMAL, "support.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(RecipeError, match=r"does not exist - did you mean .*support\.yaml\?"):
        load(tmp_path / "suport.yaml")
    with pytest.raises(RecipeError, match="metier init"):
        load(tmp_path / "elsewhere" / "job.yaml")


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_no_text_breaks_the_reader(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, "utf-8", newline="")
    with pytest.raises(RecipeError):
        load(path)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(("model", "data", "task", "method", "train", "other")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(("kind", "base", "train", "rank", "epochs", "schedule")), inner, max_size=3
                )
            ),
            max_leaves=8,
        ),
    )
)
def test_no_tree_breaks_the_validation(tree):
    try:
        found = parse(tree).model_fields_set
    except RecipeError as error:
        found = [fault.hint for fault in error.faults]
    assert all(found)


# ------------------------------------------------------------------------------------------------ there and back

WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
FILES = WORDS.map(lambda word: f"{word}.csv")
SHARES = st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True)
POSITIVE = st.floats(min_value=1e-9, max_value=1e9)
COUNTS = st.integers(1, 4096)
BETAS = st.tuples(st.floats(0, 0.999), st.floats(0, 0.999))
SCHEDULES = st.one_of(
    st.builds(room.Constant), st.builds(room.Linear, warmup=SHARES), st.builds(room.Cosine, warmup=SHARES),
    st.builds(room.Step, step_size=COUNTS, gamma=SHARES),
)  # fmt: skip
ANY_RECIPE = st.builds(
    Recipe,
    model=st.builds(room.ModelSection, base=WORDS, revision=st.none() | WORDS, threads=st.none() | COUNTS),
    data=st.builds(
        room.DataSection, train=WORDS, validation=SHARES | FILES, test=SHARES | FILES, columns=st.dictionaries(WORDS, WORDS, max_size=3),
        group=st.none() | WORDS,
    ),
    task=st.one_of(
        st.builds(room.ChatTask, system=st.none() | WORDS, max_tokens=st.none() | st.integers(8, 9999)),
        st.builds(room.CompleteTask, middle_share=SHARES, middle_tokens=st.none() | st.tuples(WORDS, WORDS, WORDS)),
        st.builds(room.ClassifyTask, labels=st.none() | st.lists(WORDS, max_size=4).map(tuple), template=WORDS),
    ),
    method=st.one_of(
        st.builds(room.FullMethod), st.builds(room.FreezeMethod, blocks=st.integers(0, 9)),
        st.builds(room.LoRAMethod, rank=COUNTS, alpha=POSITIVE, targets=st.just("auto") | st.lists(WORDS, max_size=3).map(tuple)),
    ),
    train=st.builds(
        room.TrainSection, learning_rate=st.just("auto") | st.floats(0, 1), epochs=POSITIVE, schedule=SCHEDULES,
        optimizer=st.builds(room.AdamW, betas=BETAS) | st.builds(room.Adam, betas=BETAS, amsgrad=st.booleans()),
    ),
    evaluate=st.builds(room.EvaluateSection, answer_after=st.none() | WORDS, rows=st.none() | COUNTS),
    export=st.builds(room.ExportSection, folder=WORDS, license=st.none() | WORDS),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(ANY_RECIPE)
def test_what_is_dumped_is_read_back_as_the_same(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(recipe), "utf-8", newline="\n")
    assert load(path) == recipe


@pytest.mark.parametrize(
    "word",
    [
        "no",
        "null",
        "1e-4",
        "1_000",
        "2020-01-01",
        "0o17",
        "~",
        "yes: no",
        " a ",
        "a\nb",
        "a\r\nb",
        "\u2028",
        "#x",
        "&a",
        "*a",
        "🙂",
    ],
)
def test_words_that_yaml_would_take_for_something_else_survive(write, word):
    recipe = parse(
        {
            "model": {"base": word},
            "data": {"train": word, "columns": {word: word}},
            "task": {"kind": "classify", "labels": [word, "b"], "template": word},
        }
    )
    assert load(write(dump(recipe))) == recipe


def test_a_dumped_recipe_writes_every_default_out():
    tree = yaml.safe_load(dump(parse(yaml.safe_load(MINIMAL))))
    assert list(tree) == list(Recipe.model_fields)
    usual = {"betas": [0.9, 0.999], "weight_decay": "auto", "states": "fp32", "during_backward": False}
    assert tree["train"]["optimizer"] == {"kind": "adamw", **usual}
    assert list(tree["export"]) == list(room.ExportSection.model_fields)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.y*ml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_read(write, path):
    recipe = load(path)
    assert load(write(dump(recipe))) == recipe


# ------------------------------------------------------------------------------------------------ its documentation


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_is_documented_and_no_section_is_long(section):
    assert section.__doc__ not in {None, Section.__doc__}
    assert len(section.model_fields) <= MOST_FIELDS
    for name, field in section.model_fields.items():
        # The docstring of its section says what a kind is.
        if name != "kind":
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.rstrip().endswith((".", ")")), field.description


def test_the_schema_describes_every_field_and_takes_what_load_takes():
    schema = json_schema()
    parts = {"Recipe": schema, **schema["$defs"]}
    assert set(parts) >= {"Recipe", "LoRAMethod", "TrainSection", "ChatTask", "Step"}
    for part, said in parts.items():
        assert said["description"], part
        assert said["additionalProperties"] is False, part
        for name, field in said["properties"].items():
            # A description that its section's own repeats stands there only.
            below = schema["$defs"].get(field.get("$ref", "").rsplit("/", 1)[-1], {})
            assert name == "kind" or field.get("description") or below.get("description"), f"{part}.{name}"
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    assert validator.is_valid(json.loads(parse(yaml.safe_load(MINIMAL)).model_dump_json()))
    assert not validator.is_valid({"model": {"base": "x"}, "data": {"train": "a"}, "task": {"kind": "chta"}})


def test_the_schema_takes_the_short_words():
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())
    tree = yaml.safe_load(f"{MINIMAL}method: full\ntrain: {{schedule: cosine, optimizer: adam}}\n")
    assert validator.is_valid(tree)
    assert not validator.is_valid(tree | {"method": "fulll"})


def test_reading_a_recipe_needs_no_torch():
    code = "import sys; from metier import recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ counting steps


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs", "max_steps", "per_epoch", "total"),
    [(100, 16, 3, None, 7, 21), (16, 16, 1, None, 1, 1), (1, 16, 0.1, None, 1, 1), (100, 10, 0.25, None, 10, 2), (100, 10, 3, 7, 10, 7), (100, 10, 0.5, 99, 10, 5)],
)  # fmt: skip
def test_steps_are_counted_from_rows_and_epochs(rows, batch_size, epochs, max_steps, per_epoch, total):
    section = room.TrainSection(batch_size=batch_size, epochs=epochs, max_steps=max_steps)
    assert (section.steps_per_epoch(rows), section.total_steps(rows)) == (per_epoch, total)
