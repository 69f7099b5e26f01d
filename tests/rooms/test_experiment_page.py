"""The page of an experiment: what it says first, that names stand free, that nothing in a comparison can break it."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import made_comparison as made
import pytest
from pages import CHROMIUM, Reader, browse

from metier import report
from metier.core.comparison import Comparison, Interference
from metier.core.evidence import Baseline, Figure
from metier.report import charts, plots
from metier.report.experiment import forest, growth, interference, plane, rates, told
from metier.report.experiment.finding import WORDS
from metier.report.experiment.view import View
from metier.report.plots import Name, Plot
from metier.report.voice import Voice

EN, ZH = Voice("en"), Voice("zh")
FULL = ("Full", 0.866, 0.391, 0.968, 3e-5, 1.4, 4.4e9, 538_000_000, 1.0)


def view(comparison=None, voice=EN):
    return View(comparison or made.comparison(), voice)


def page(tmp_path, comparison=None, **changes):
    return report.write_experiment(tmp_path, comparison or made.comparison(), **changes).read_text("utf-8")


def two(difference, half=0.02, *, accuracy=(0.861, 0.866), **changes):
    """LoRA and full, and how they differ."""
    title, _, *facts = made.ARMS["lora"]
    lora = made.arm("lora", title, accuracy[0], *facts)
    full = made.arm("full", "Full", accuracy[1], *FULL[2:])
    rest = [p for p in made.pairs((lora, full)) if p.left == "base" or not p.primary]
    between = made.pair("lora", "full", "accuracy", difference, half, primary=True, **changes.pop("needed", {}))
    return made.comparison((lora, full), pairs=(between, *rest), **changes)


def only(found, name):
    """The one thing of that name."""
    (thing,) = [item for item in found if item.name == name]
    return thing


# What is written


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("case", made.CASES)
def test_every_case_is_written_and_read_back(tmp_path, case, language):
    comparison = made.CASES[case]()
    path = report.write_experiment(tmp_path, comparison, language, environment={"python": "3.11", "<b>": ["<i>"]})
    assert path == tmp_path / "comparison.html"
    again = Comparison.model_validate_json((tmp_path / "comparison.json").read_text("utf-8"))
    assert again.verdict == report.experiment_verdict(comparison, language)
    assert repr(again) == repr(comparison.model_copy(update={"verdict": again.verdict}))  # NaN equals nothing
    reader = Reader(path.read_text("utf-8"))
    assert reader.open == []
    assert "None" not in reader.words
    assert not re.search(r"\bnan\b|\binf\b", reader.words)


@pytest.mark.parametrize("case", made.CASES)
def test_what_is_written_is_valid_by_its_schema(tmp_path, case):
    import jsonschema

    report.write_experiment(tmp_path, made.CASES[case]())
    schema = report.json_schema("comparison")
    jsonschema.Draft202012Validator.check_schema(schema)
    written = json.loads((tmp_path / "comparison.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(written)
    assert not jsonschema.Draft202012Validator(schema).is_valid({**written, "arms": "none"})


def test_a_verdict_that_was_given_is_kept(tmp_path):
    assert "As I said." in Reader(page(tmp_path, made.comparison(verdict=("As I said.",)))).words


@pytest.mark.parametrize("case", made.CASES)
def test_the_page_is_self_contained(tmp_path, case):
    text = page(tmp_path, made.CASES[case]())
    reader = Reader(text)
    assert not {"script", "iframe", "object", "base", "form", "img"} & set(reader.tags)
    assert all(not name.startswith("on") and name not in {"style", "src"} for name, _ in reader.attributes)
    assert {value for name, value in reader.attributes if name == "href"} == {"data:,"}
    assert "default-src 'none'" in text


@pytest.mark.parametrize("case", made.CASES)
def test_every_drawing_is_an_image_with_a_title_and_every_plot_is_described(tmp_path, case):
    text = page(tmp_path, made.CASES[case]())
    drawings = re.findall(r"<svg[^>]*>(?:<title>.*?</title>)?(?:<desc>.*?</desc>)?", text, re.DOTALL)
    assert drawings
    for drawing in drawings:
        if 'aria-hidden="true"' in drawing or 'class="change-chart" width' in drawing:
            continue
        assert 'role="img"' in drawing
        assert "<title>" in drawing
        assert "<desc>" in drawing or "panel plot" not in drawing


def test_sections_without_data_do_not_appear(tmp_path):
    whole, little = (
        set(re.findall(r'<section id="(\w+)"', page(tmp_path, case()))) for case in (made.comparison, made.small)
    )
    assert {"plane", "differences", "growth", "rates", "cost", "guards", "answers", "baselines"} <= whole
    assert little == {"arms", "rates", "cost", "stability", "how"}


def test_the_page_says_what_the_comparison_says(tmp_path):
    comparison = made.comparison()
    words = Reader(page(tmp_path, comparison)).words.replace("\u00a0", " ")
    for said in (*report.experiment_verdict(comparison), *comparison.notes, comparison.command, *comparison.shrunk):
        assert said in words
    for arm in comparison.arms:
        assert arm.title in words
        assert EN.amount(arm.figures["accuracy"].value, "share") in words
    assert "0, 1, 2" in words


def test_the_chinese_page_has_no_english_left(tmp_path):
    texts = {"notes": (), "shrunk": (), "told": (), "command": "", "verdict": ("好",)}
    comparison = made.comparison(**texts)
    arms = tuple(arm.model_copy(update={"method": "", "title": "LoRA"}) for arm in comparison.arms)
    body = Reader(page(tmp_path, comparison.model_copy(update={"arms": arms}), language="zh")).words
    words = {word.lower() for word in re.findall(r"[A-Za-z]{3,}", body.split("}")[-1])}
    named = {
        "demo",
        "smollm",
        "classify",
        "metier",
        "lora",
        "holm",
        "sha",
        "utc",
        "nats",
        "idf",
        "ties",
        "dare",
        "float",
    }
    named |= {"comparison", "json", "accuracy", "text", "loss"}
    assert words <= named


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_of_several_tasks(tmp_path, language):
    import jsonschema

    path = report.write_interference(tmp_path, made.TASKS, language, environment={"python": "3.11"})
    written = (tmp_path / "interference.json").read_text("utf-8")
    assert Interference.model_validate_json(written) == made.TASKS
    jsonschema.Draft202012Validator(report.json_schema("interference")).validate(json.loads(written))
    text = path.read_text("utf-8")
    reader = Reader(text)
    assert reader.open == []
    assert not {"script", "iframe", "object", "base", "form", "img"} & set(reader.tags)
    words = reader.words.replace("\u00a0", " ")
    for said in (*report.interference_verdict(made.TASKS, language), *made.TASKS.notes, made.TASKS.command):
        assert said in words
    if language == "en":
        assert "Joint banking77 −2.0 points −4.0 to +0.0" in words
        assert "In sequence forgot: support desk 60.0 points, banking77 25.0 points." in words
    else:
        left = {word.lower() for word in re.findall(r"[A-Za-z]{3,}", words.split("}")[-1])}
        named = {"support", "desk", "banking", "reviews", "smollm", "demo", "metier", "compare", "yaml", "json"}
        assert left <= named | {
            "ties",
            "dare",
            "interference",
            "utc",
            "python",
            "all",
            "test",
            "rows",
            "are",
            "one",
            "donor",
        }


# Nothing in the data breaks the page


def test_names_of_tasks_stay_text_and_figures_need_not_be_numbers(tmp_path):
    lost = made.held(math.nan)
    changes = {"tasks": made.NASTY[:3], "base": (lost, made.held(0.1), made.held(math.inf)), "command": made.NASTY[2]}
    reader = Reader(report.write_interference(tmp_path, made.TASKS.model_copy(update=changes)).read_text("utf-8"))
    assert reader.open == []
    assert not {"script", "img"} & set(reader.tags)
    for given in made.NASTY[:3]:
        assert given in reader.words


def test_tags_in_a_comparison_stay_text(tmp_path):
    reader = Reader(page(tmp_path, made.hostile()))
    for given in made.NASTY[:3]:
        assert given in reader.words
    assert not {"script", "img"} & set(reader.tags)


def test_control_characters_are_shown_and_order_cannot_be_changed(tmp_path):
    text = page(tmp_path, made.hostile())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\x85\u202a-\u202e\u2066-\u2069]", text)
    assert "⟨U+202E⟩" in text


# The answer


def test_no_difference_is_said_with_delta():
    first = report.experiment_verdict(two(0.001, 0.006))[0]
    assert first == (
        "Accuracy: Full and LoRA, rank 16 do not differ by more than 1.0 points"
        " (Full minus LoRA, rank 16 +0.1 points, 90 % interval −0.4 to +0.6)."
    )


def test_what_stays_open_says_what_would_settle_it():
    needed = {"rows_needed": 1900, "seeds_needed": 7}
    assert "about 1,900 test rows or 7 seeds would tell" in report.experiment_verdict(two(0.005, needed=needed))[0]
    nothing = {"rows_needed": None}
    assert "neither more rows nor more seeds" in report.experiment_verdict(two(0.005, needed=nothing))[0]


def test_the_better_arm_wins_whichever_side_of_the_pair_it_is():
    assert report.experiment_verdict(two(0.05, accuracy=(0.84, 0.89)))[0] == (
        "Accuracy: Full is better than LoRA, rank 16 by 5.0 points (95 % interval 3.0 to 7.0)."
    )
    assert report.experiment_verdict(two(-0.05, accuracy=(0.89, 0.84)))[0] == (
        "Accuracy: LoRA, rank 16 is better than Full by 5.0 points (95 % interval 3.0 to 7.0)."
    )


def test_of_many_arms_each_is_placed():
    first = report.experiment_verdict(made.comparison())[0]
    assert first.startswith("Accuracy: Full comes first with ")
    assert "better than Frozen but last 2 blocks" in first
    assert "not told apart from LoRA, rank 16" in first


@pytest.mark.parametrize(("reached", "said"), [(0.95, "not worth it"), (0.862, "does as well")])
def test_a_cheap_way_that_is_as_good_is_said_first(reached, said):
    cheap = (made.baseline("linear_words", "Linear model on words", reached),)
    lines = report.experiment_verdict(two(0.0005, 0.006, baselines=cheap))
    assert said in lines[0]
    assert "Linear model on words" in lines[0]
    assert "do not differ by more than" in lines[1]


def test_a_cheap_way_that_loses_is_named_with_the_amounts():
    lines = report.experiment_verdict(two(0.05, accuracy=(0.84, 0.89)))
    assert lines[1].endswith("The best cheap way, Linear model on words, reaches 71.7 %.")


@pytest.mark.parametrize(
    ("change", "half", "said"),
    [(-0.05, 0.02, "Tuning hurt"), (0.001, 0.005, "changed nothing that counts"), (0.01, 0.02, "No clear gain")],
)
def test_tuning_without_a_gain_is_said_first(change, half, said):
    only_base = tuple(made.pair("base", name, "accuracy", change, half, primary=True) for name in ("lora", "full"))
    comparison = two(0.0, baselines=())
    between = tuple(pair for pair in comparison.pairs if pair.left != "base")
    found = comparison.model_copy(update={"pairs": (*only_base, *between)})
    assert said in report.experiment_verdict(found)[0]


def test_amounts_name_gain_retention_and_the_floor():
    second = report.experiment_verdict(two(0.05, accuracy=(0.84, 0.89)))[1]
    assert "keeps 99.1 % of general ability" in second
    assert "keeps 96.8 % of general ability (below the floor of 98.0 %)" in second
    assert "LoRA, rank 16 needs 0.48 × the memory" in second


def test_conditions_name_model_rows_seeds_steps_precision_delta_budget_and_what_was_left_out():
    last = report.experiment_verdict(made.comparison())[-1]
    for said in (
        "demo:smollm2-135m",
        "960 training",
        "240 test",
        "3 seeds",
        "120 steps of 16",
        "float32",
        "1.0 points",
    ):
        assert said in last
    assert "a budget of 1 h 0 min" in last
    assert "2 finer points" in last


def test_arms_that_learnt_nothing_beyond_the_closed_form_do_not_come_first():
    found = made.comparison()
    cells = [tuple(cell.model_copy(update={"best_step": 0}) for cell in arm.cells) for arm in found.arms]
    arms = tuple(arm.model_copy(update={"cells": own}) for arm, own in zip(found.arms, cells, strict=True))
    assert report.experiment_verdict(found.model_copy(update={"arms": arms}))[0] == (
        "No step of tuning was better on validation than what is fitted in closed form before it, which reaches"
        " 86.1 % by itself (Accuracy)."
    )
    arms = (found.arms[0], *arms[1:])
    assert "comes first" in report.experiment_verdict(found.model_copy(update={"arms": arms}))[0]


def test_arms_that_all_diverged_are_said():
    arms = tuple(arm.model_copy(update={"figures": {}}) for arm in made.comparison().arms)
    assert "every training diverged" in report.experiment_verdict(made.comparison(arms, pairs=()))[0]


def test_lower_is_better_where_the_measure_says_so(tmp_path):
    comparison = made.comparison(primary="loss", baselines=(), delta=0.02)
    assert view(comparison).ranked()[0].name == "full"
    assert view(comparison).better_than(1.0) == pytest.approx(0.62)
    assert "−1.2" in report.experiment_verdict(comparison)[1]
    assert Reader(page(tmp_path, comparison)).open == []


def test_every_sentence_is_there_in_both_languages_with_the_same_blanks():
    assert WORDS["en"].keys() == WORDS["zh"].keys()
    for key, text in WORDS["en"].items():
        assert set(re.findall(r"{(\w+)}", text)) == set(re.findall(r"{(\w+)}", WORDS["zh"][key])), key


# The figures


def test_the_front_holds_what_no_other_point_beats():
    assert plane.front([(1.0, 0.0), (0.9, 0.5), (0.8, 0.4), (0.7, 0.9)]) == [(0.7, 0.9), (0.9, 0.5), (1.0, 0.0)]
    stairs = plane.stairs([(0.7, 0.9), (1.0, 0.0)], 0.5, -0.1)
    assert stairs == [(0.5, 0.9), (0.7, 0.9), (0.7, 0.0), (1.0, 0.0), (1.0, -0.1)]


def test_two_lines_cross_where_they_are_equal():
    arms = made.comparison().arms
    curve = {name: [p for p in made.curve(arms) if p.arm == name] for name in ("lora", "full")}
    (found,) = growth.crossed(view(), curve, "lora", "full")
    # 0.741 + 0.055 x = 0.701 + 0.081 x at x = 40/26 doublings over an eighth of the rows
    assert found.rows == pytest.approx(120 * 2 ** (40 / 26), rel=1e-3)
    assert (found.before, found.after) == ("lora", "full")


def test_losses_far_above_lie_at_the_top_and_stay_in_the_table():
    assert rates.highest([0.4, 0.45, 0.5, 9.0]) < 9
    assert rates.highest([0.5, 0.5]) == math.inf
    drawn = rates.draw(view())
    assert drawn.has_diverged
    assert sum("diverged" in row.cells for row in drawn.table.rows) == 3
    assert sum("✓" in row.cells[0] for row in drawn.table.rows) == 3


def test_a_rate_at_the_edge_is_warned_of():
    arms = [arm.model_copy(update={"at_edge": arm.name == "lora"}) for arm in made.comparison().arms]
    (warning,) = rates.draw(view(made.comparison(tuple(arms)))).warnings
    assert warning.startswith("LoRA, rank 16: the best rate, 3e-4, lies at the edge")


def test_the_zone_of_equivalence_is_as_wide_as_delta():
    drawn = charts.difference(0.0, (-0.5, 0.5), 1.0, style="neutral", title="t", zone=0.25)
    assert 'class="zone" x="37.50%" width="25.00%"' in drawn


def test_primary_pairs_stand_open_and_the_others_are_folded():
    found = forest.draw(view())
    assert [len(block.lines) for block in found.primary] == [3, 3]
    assert all("Accuracy" not in block.title for block in found.others)


def test_a_heat_map_marks_what_is_worse_than_the_base():
    first, *others = interference.draw(made.TASKS, EN).maps
    rows = dict(first.rows)
    assert rows["One adapter each"][0].interval == "88.0 to 94.0 %"
    assert [square.text for square in rows["One adapter each"]] == ["91.0 %", "88.0 %", "79.0 %"]
    assert rows["One adapter each"][0].style == "gain heat-9"
    assert [m.title for m in others] == ["One adapter each", "In sequence"]
    assert others[0].rows[0][1][1].text == "▾ 10.0 %"
    assert others[0].rows[0][1][1].style.startswith("loss")


@pytest.mark.parametrize(
    ("right", "name"),
    [
        ({"base": False, "a": True, "b": True}, "win"),
        ({"base": True, "a": False, "b": False}, "loss_group"),
        ({"base": True, "a": True, "b": False}, "differ"),
        ({"base": True, "a": True, "b": True}, "all_right"),
        ({"base": False, "a": False}, "all_wrong"),
        ({"a": True}, "all_right"),
        ({}, "unjudged"),
    ],
)
def test_examples_are_grouped_by_who_was_right(right, name):
    row = made.told()[0].model_copy(update={"right": right})
    assert told.group(row) == name
    css = (Path(report.__file__).parent / "templates" / "style.css").read_text("utf-8")
    assert f"#f-{name}:checked ~ .groups > :not(.g-{name})" in css


def test_names_of_points_that_lie_close_stand_apart():
    axis = plots.axis([0.0, 1.0], say=str)
    names = [Name(f"a name of arm {i}", "", (0.5 + 0.001 * i, 0.5)) for i in range(6)]
    plot = Plot(axis, axis, 300, names=names)
    spots = [spot for _, spot in plots.placed(plot)]
    width = plots.pixels(names[0].text)
    for i, one in enumerate(spots):
        for other in spots[:i]:
            left, right = (plots._sides(spot, width, 225) for spot in (one, other))
            apart = left[0] >= right[1] or right[0] >= left[1]
            assert apart or abs(one.down - other.down) >= 12


def test_a_name_that_is_too_long_is_cut():
    assert plots.cut("short") == "short"
    assert plots.pixels(plots.cut("x" * 99)) <= plots.LONGEST < plots.WIDTHS[0]
    assert plots.pixels(plots.cut("字" * 99)) <= plots.LONGEST


@pytest.mark.parametrize(
    ("rate", "said"), [(3e-4, "3e-4"), (1.73e-3, "1.7e-3"), (0.1, "1e-1"), (math.nan, "?"), (0.0, "?")]
)
def test_rates_are_said_shortly(rate, said):
    assert plots.power_of_ten(rate) == said


def test_labels_of_an_axis_have_room_on_the_narrowest_screen():
    scale = charts.Scale(0, 10)
    assert [place for place, _ in plots.spaced(scale, [(9.5, "10,000"), (9.9, "12,000"), (0, "1,000")])] == [0, 9.9]


# The terminal


def test_the_table_has_base_cheap_ways_and_arms():
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.experiment_table(made.comparison()))
    lines = console.export_text()
    assert re.search(r"Base +42\.1 %", lines)
    assert re.search(r"Linear model on words \(not tuned\) +71\.7 %", lines)
    assert re.search(r"LoRA, rank 16 .*99\.1 % +3e-4 +2 min \d+ s +2\.1 GB +19\.5 MB", lines)
    assert "\u2212" not in lines


@pytest.mark.parametrize("case", made.CASES)
def test_every_case_has_a_table(case):
    assert report.experiment_table(made.CASES[case](), "zh").row_count > 0


# In a browser

OVERLAPS = """<script>
const found = [];
for (const plot of document.querySelectorAll('svg.plot')) {
  const texts = [...plot.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const room = plot.closest('figure').getBoundingClientRect();
  texts.forEach(([said, a], i) => {
    if (a.left < room.left || a.right > room.right) found.push(said + ' leaves the card');
    texts.slice(0, i).forEach(([other, b]) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > 3) found.push(said + ' covers ' + other);
    });
  });
}
document.title = JSON.stringify([found, document.documentElement.scrollWidth, innerWidth]);
</script>"""


def probed(tmp_path, comparison, language, width):
    """What overlaps on a page of that width, and how wide it became."""
    text = re.sub(r"<meta http-equiv.*?>", "", page(tmp_path, comparison, language=language), count=1)
    narrow = f"<style>html {{ width: {width}px }}</style>"
    path = tmp_path / "probe.html"
    path.write_text(
        text.replace("</body>", narrow + OVERLAPS + "</body>").replace("<details", "<details open"), "utf-8"
    )
    document, _ = browse(tmp_path, path, width=width)
    return json.loads(re.search(r"<title>(.*?)</title>", document)[1].replace("&amp;", "&"))


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed")
class TestInChromium:
    @pytest.mark.parametrize("case", ["whole", "hostile"])
    def test_pages_render_without_a_word_on_the_console(self, tmp_path, case):
        path = report.write_experiment(tmp_path, made.CASES[case]())
        document, console = browse(tmp_path, path)
        assert console == []
        assert "</footer>" in document

    @pytest.mark.parametrize("width", [360, 1100])
    @pytest.mark.parametrize(
        ("case", "language"), [("whole", "en"), ("whole", "zh"), ("crowded", "en"), ("hostile", "en")]
    )
    def test_no_text_of_a_plot_covers_another_at_any_width(self, tmp_path, case, language, width):
        found, wide, window = probed(tmp_path, made.CASES[case](), language, width)
        assert found == []
        assert wide <= max(window, width)


def test_a_baseline_without_the_primary_measure_is_no_line(tmp_path):
    other = Baseline(
        name="o", title="Other", how="-", seconds=1.0, figures=(Figure(name="f1", estimate=made.estimate(0.5)),)
    )
    assert view(made.comparison(baselines=(other,))).baselines() == []
    assert Reader(page(tmp_path, made.comparison(baselines=(other,)))).open == []
