"""Splits share nothing, repeats are found, and what the rows give away is told."""

import json
import random
import re
from collections import Counter

import pytest

from metier.core import DataError
from metier.data import personal, read, similar
from metier.data.content import normalised
from metier.recipe import DataSection

CLASSIFY = ("label",)
PROMPTS = ("prompt", "text")


def words(seed, count=12):
    """Words that no other seed shares."""
    chance = random.Random(seed)
    return " ".join(
        f"{chance.choice('bcdfgklmnprst')}{chance.choice('aeiou')}{chance.randrange(10_000)}" for _ in range(count)
    )


def labelled(count, classes=4):
    return [{"text": words(n), "label": f"class{n % classes}", "doc": f"d{n // 5}"} for n in range(count)]


def write(folder, rows, name="train.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(records):
    return [record.text for record in records]


def test_shares_are_disjoint_complete_in_order_and_drawn_by_the_seed(tmp_path):
    path = write(tmp_path, labelled(200))
    first, again, other = (read(DataSection(train=path, seed=seed), accepts=CLASSIFY) for seed in (0, 0, 1))
    assert (len(first.train), len(first.validation), len(first.test)) == (160, 20, 20)
    assert first == again
    assert texts(first.test) != texts(other.test)
    assert sorted(texts(first.train) + texts(first.validation) + texts(first.test)) == sorted(
        words(n) for n in range(200)
    )
    for records in (first.train, first.validation, first.test):
        lines = [int(record.where.rpartition(":")[2]) for record in records]
        assert lines == sorted(lines)


def test_changing_the_validation_share_never_changes_the_test_rows(tmp_path):
    path = write(tmp_path, labelled(200))
    one, other = (read(DataSection(train=path, validation=share), accepts=CLASSIFY) for share in (0.1, 0.3))
    assert one.test == other.test
    assert len(other.validation) == 60


def test_classes_keep_their_shares(tmp_path):
    rows = [{"text": words(n), "label": "rare" if n % 10 == 0 else "common"} for n in range(200)]
    splits = read(DataSection(train=write(tmp_path, rows), test=0.2), accepts=CLASSIFY)
    assert Counter(record.label for record in splits.test) == {"rare": 4, "common": 36}
    assert Counter(record.label for record in splits.validation) == {"rare": 2, "common": 18}


def test_the_last_row_of_a_class_stays_in_training(tmp_path):
    rows = labelled(40, 2) + [{"text": words(n), "label": f"single{n}"} for n in range(100, 108)]
    for seed in range(5):
        splits = read(DataSection(train=write(tmp_path, rows), test=0.4, seed=seed), accepts=CLASSIFY)
        assert {record.label for record in splits.test} <= {record.label for record in splits.train}
    assert any("8 labels with a single training row" in note for note in splits.notes)


def test_groups_stay_on_one_side(tmp_path):
    path = write(tmp_path, labelled(200))
    splits = read(DataSection(train=path, group="doc", test=0.2), accepts=CLASSIFY)
    sides = [{record.extras["doc"] for record in side} for side in (splits.train, splits.validation, splits.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert 35 <= len(splits.test) <= 40
    with pytest.raises(DataError, match=r"no column 'docs', which data\.group names - did you mean doc\?"):
        read(DataSection(train=path, group="docs"), accepts=CLASSIFY)
    rows = labelled(40)
    del rows[6]["doc"]
    with pytest.raises(DataError, match=r"train\.jsonl:7: doc, which data\.group names"):
        read(DataSection(train=write(tmp_path, rows), group="doc"), accepts=CLASSIFY)


def test_a_group_may_be_a_column_that_is_learnt(tmp_path):
    rows = [{"prompt": f"{words(n % 20)}", "completion": f"answer {n}"} for n in range(60)]
    splits = read(DataSection(train=write(tmp_path, rows), group="prompt"), accepts=PROMPTS)
    assert {record.prompt for record in splits.train}.isdisjoint(record.prompt for record in splits.test)


def test_repeats_and_near_repeats_land_on_one_side(tmp_path):
    rows = []
    for n in range(60):
        text = words(n, 30)
        rows += [{"text": text}, {"text": text.upper() + " !"}, {"text": text + " indeed"}]
    splits = read(DataSection(train=write(tmp_path, rows), validation=0.2, test=0.3), accepts=PROMPTS)
    sides = [
        {text.lower().split()[0] for text in texts(side)} for side in (splits.train, splits.validation, splits.test)
    ]
    assert len(sides[0]) + len(sides[1]) + len(sides[2]) == 60
    assert (len(splits.validation), len(splits.test)) == (36, 54)


def test_rows_that_are_all_one_block_cannot_be_split(tmp_path):
    text = words(0, 40)
    rows = [{"text": f"{text} {n}"} for n in range(18)]
    with pytest.raises(
        DataError, match=r"near copies and groups stay together.* - name a file of other rows with data\.test=FILE"
    ):
        read(DataSection(train=write(tmp_path, rows)), accepts=PROMPTS)


def test_max_rows_draws_by_the_seed_and_keeps_the_order(tmp_path):
    path = write(tmp_path, labelled(300))
    one, again, other = (read(DataSection(train=path, max_rows=100, seed=seed), accepts=CLASSIFY) for seed in (0, 0, 1))
    assert len(one.train) + len(one.validation) + len(one.test) == 100
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert any("100 of 300 rows are used" in note for note in one.notes)


def test_the_fingerprint_is_of_the_content_in_order(tmp_path):
    rows = labelled(100)
    (tmp_path / "elsewhere").mkdir()

    def fingerprint(rows, folder=tmp_path):
        test = write(folder, labelled(130)[100:], "test.jsonl")
        section = DataSection(train=write(folder, rows), validation=0.1, test=test)
        return read(section, accepts=CLASSIFY).fingerprint

    first = fingerprint(rows)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert fingerprint(rows, tmp_path / "elsewhere") == first
    assert fingerprint(rows[::-1]) != first
    assert fingerprint([*rows[:-1], rows[-1] | {"doc": "other"}]) != first
    assert fingerprint([*rows[:-1], rows[-1] | {"label": "class0"}]) != first


@pytest.fixture
def overlapping(tmp_path):
    """100 training rows, of which two stand in the 30 test rows word for word and one nearly."""
    train = labelled(100)
    test = labelled(130)[100:]
    test[0] = train[10] | {"text": train[10]["text"].upper() + "!!"}
    test[1] = train[20]
    test[2] = train[30] | {"text": train[30]["text"] + " indeed"}
    return {"train": write(tmp_path, train), "test": write(tmp_path, test, "test.jsonl")}


def test_overlap_is_refused_with_counts_pairs_and_remedies(overlapping):
    with pytest.raises(DataError) as caught:
        read(DataSection(**overlapping), accepts=CLASSIFY)
    said = str(caught.value)
    assert "3 training rows also in test" in said
    assert "2 word for word, 1 nearly" in said
    assert all(remedy in said for remedy in ("data.overlap=drop", "data.overlap=allow", "take them out"))
    assert re.search(r"train\.jsonl:11: stands at .*test\.jsonl:1 too \(word for word\)", said)
    assert re.search(r"train\.jsonl:31: stands at .*test\.jsonl:3 too \(Jaccard 0\.91\)", said)


def test_overlap_is_dropped_from_training_only(overlapping):
    splits = read(DataSection(**overlapping, overlap="drop"), accepts=CLASSIFY)
    assert len(splits.test) == 30
    assert len(splits.train) + len(splits.validation) == 97
    assert not {words(10), words(20), words(30)} & set(texts([*splits.train, *splits.validation]))
    assert any("left out of training" in note and "3 training rows" in note for note in splits.notes)


def test_overlap_is_allowed_with_a_note(overlapping):
    splits = read(DataSection(**overlapping, overlap="allow"), accepts=CLASSIFY)
    assert len(splits.train) + len(splits.validation) == 100
    assert any("data.overlap=allow" in note for note in splits.notes)


def test_overlap_by_group(tmp_path):
    train, test = labelled(100), labelled(130)[100:]
    test[0]["doc"] = "d3"
    section = DataSection(train=write(tmp_path, train), test=write(tmp_path, test, "test.jsonl"), group="doc")
    with pytest.raises(DataError, match="5 by the same doc"):
        read(section, accepts=CLASSIFY)
    splits = read(section.model_copy(update={"overlap": "drop"}), accepts=CLASSIFY)
    assert "d3" not in {record.extras["doc"] for record in [*splits.train, *splits.validation]}


def test_validation_rows_that_stand_in_test_are_noted(tmp_path):
    rows = labelled(160)
    section = DataSection(
        train=write(tmp_path, rows[:100]),
        validation=write(tmp_path, rows[100:131], "validation.jsonl"),
        test=write(tmp_path, rows[130:], "test.jsonl"),
    )
    assert any("1 validation row also in test" in note for note in read(section, accepts=CLASSIFY).notes)


def test_the_system_prompt_and_the_reply_do_not_count_as_the_same_question(tmp_path):
    def talk(question, answer):
        turns = [("system", words(0, 60)), ("user", question), ("assistant", answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    train = write(tmp_path, [talk(words(n), words(999)) for n in range(1, 41)])
    test = write(tmp_path, [talk(words(n), words(999)) for n in range(41, 81)], "test.jsonl")
    assert len(read(DataSection(train=train, test=test), accepts=("messages",)).test) == 40
    test = write(tmp_path, [talk(words(n), words(1000 + n)) for n in range(40, 80)], "test.jsonl")
    with pytest.raises(DataError, match="1 training row also in test"):
        read(DataSection(train=train, test=test), accepts=("messages",))


def test_a_short_prompt_is_compared_with_its_completion(tmp_path):
    train = write(tmp_path, [{"prompt": "Continue:", "completion": words(n)} for n in range(40)])
    test = write(tmp_path, [{"prompt": "Continue:", "completion": words(n)} for n in range(39, 80)], "test.jsonl")
    with pytest.raises(DataError, match="1 training row also in test"):
        read(DataSection(train=train, test=test), accepts=PROMPTS)


def test_labels_that_training_lacks_are_named_by_line(tmp_path):
    test = labelled(130)[100:]
    test[4]["label"] = test[9]["label"] = "class9"
    section = DataSection(train=write(tmp_path, labelled(100)), test=write(tmp_path, test, "test.jsonl"))
    with pytest.raises(DataError) as caught:
        read(section, accepts=CLASSIFY)
    assert [fault.where.rpartition("/")[2] for fault in caught.value.faults] == ["test.jsonl:5", "test.jsonl:10"]
    assert "the label 'class9' never stands in train, which has 4 labels: class0, class1" in str(caught.value)


def test_one_class_is_refused(tmp_path):
    with pytest.raises(DataError, match="every row has the label 'class0': there is nothing to tell apart"):
        read(DataSection(train=write(tmp_path, labelled(50, classes=1))), accepts=CLASSIFY)


def test_a_text_under_two_labels_is_noted(tmp_path):
    rows = [*labelled(50), labelled(50)[7] | {"label": "class0"}]
    notes = read(DataSection(train=write(tmp_path, rows)), accepts=CLASSIFY).notes
    assert any("1 row repeats another row word for word" in note for note in notes)
    assert any("1 text stands under more than one label" in note for note in notes)


def test_a_label_that_stands_in_its_text_is_refused(tmp_path):
    def rows(text):
        return [{"text": text(n, "ab"[n % 2] * 3), "label": "ab"[n % 2] * 3} for n in range(60)]

    with pytest.raises(DataError, match="in 100% of the rows of train the text holds its own label"):
        read(DataSection(train=write(tmp_path, rows(lambda n, label: f"{words(n)} {label}"))), accepts=CLASSIFY)
    listing = rows(lambda n, label: f"{words(n)} aaa or bbb")
    assert read(DataSection(train=write(tmp_path, listing)), accepts=CLASSIFY).train
    inside = rows(lambda n, label: f"{words(n)} x{label}x")
    assert read(DataSection(train=write(tmp_path, inside)), accepts=CLASSIFY).train


@pytest.mark.parametrize(("given", "refused"), [(60, True), (8, False), (0, False)])
def test_a_prompt_that_ends_with_its_answer(tmp_path, given, refused):
    rows = [
        {"prompt": words(n) + (f" It is {words(n + 500, 2)}." if n < given else ""), "completion": words(n + 500, 2)}
        for n in range(60)
    ]
    section = DataSection(train=write(tmp_path, rows))
    if refused:
        with pytest.raises(DataError, match="48 prompts of 48 in train already end with the answer"):
            read(section, accepts=PROMPTS)
        return
    notes = [note for note in read(section, accepts=PROMPTS).notes if "end with the answer" in note]
    assert bool(notes) == (given > 0)


def test_a_question_that_ends_with_its_choices_gives_nothing_away(tmp_path):
    rows = [{"prompt": f"{words(n)} yes or no?", "completion": ("yes", "no")[n % 3 > 0]} for n in range(60)]
    notes = read(DataSection(train=write(tmp_path, rows)), accepts=PROMPTS).notes
    assert not any("end with the answer" in note for note in notes)


def test_the_task_may_say_what_it_learns(tmp_path):
    rows = [{"prompt": f"{words(n)} {n}", "completion": f"So #### {n}"} for n in range(60)]
    section = DataSection(train=write(tmp_path, rows))
    assert read(section, accepts=PROMPTS).train
    with pytest.raises(DataError, match="already end with the answer"):
        read(section, accepts=PROMPTS, target=lambda record: record.completion.rpartition("####")[2])


SECRETS = {
    "e-mail addresses": ["jane.doe+x@firma.co.uk", "张三 li@qq.com。"],
    "phone numbers": ["13800138000", "+86 138 0013 8000", "(555) 123-4567", "+49 30 901820", "010-62345678"],
    "card numbers": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
    "IBANs": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "resident identity numbers": ["11010519491231002X"],
    "keys and access tokens": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "-----BEGIN RSA PRIVATE KEY-----",
        "sk-" + "Ab3" * 10,
        "hf_" + "Ab3" * 10,
        "sk_live_" + "Ab3" * 8,
        "npm_" + "Ab3" * 12,
        "SG." + "Ab" * 11 + "." + "Ab3" * 14 + "x",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbg",
    ],
}
HARMLESS = [
    "mail nobody@example.com or root@localhost",
    "4111 1111 1111 1112",
    "110105194912310021",
    "DE89 3704 0044 0532 0130 01",
    "$6000-$600-150-1200-2000 = 2050, 3.14159265358979, 2020-05-11 12:30:45, 192.168.100.101",
    "1234567890123 and 20200511123045",
    "task-oriented, a risk-averse ghp_short",
    "version 4.12.0-rc1 of 2024-03-15T10:22:33.123456Z, 1700000000123, 2024-01-15 13:45:00 +0800",
    "ISBN 978-3-16-148410-0, ISBN-10 3-16-148410-X, ISSN 2049-3630, EAN 4006381333931, UPC 036000291452",
    "doi:10.1109/SEQUEN.1997.666900, arXiv:2106.09685v2, GB 11643-1999, section 123-456-7890.1",
    "2001:0db8:85a3:0000:0000:8a2e:0370:7334, 550e8400-e29b-41d4-a716-446655440000, torch@2.1.0",
    "IMEI 490154203237518, sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 of",
    "48.858370, 2.294481; 1,234,567,890.00 EUR; 2 147 483 647; 1000 2000 3000 4000; 2023 2024 2025 2026",
    "hf_hub_download(repo_id), sk-learn, eyJ, AKIA, npm_config_registry, x@y.T, 1Z999AA10123456784",
]


@pytest.mark.parametrize(("kind", "secret"), [(kind, secret) for kind, found in SECRETS.items() for secret in found])
def test_personal_data_is_found_and_never_repeated(tmp_path, kind, secret):
    rows = [{"prompt": words(n), "completion": f"ok {n}"} for n in range(40)]
    rows[5]["completion"] = f"write to {secret} soon"
    splits = read(DataSection(train=write(tmp_path, rows)), accepts=PROMPTS)
    (note,) = [note for note in splits.notes if "The rows hold" in note]
    assert f"{kind}: 1 in 1 row" in note
    assert "train.jsonl:6 (" in note
    assert secret not in note
    assert secret[3:12] not in note
    with pytest.raises(DataError, match=rf"train\.jsonl:6: {kind}"):
        read(DataSection(train=write(tmp_path, rows), personal_data="refuse"), accepts=PROMPTS)
    ignoring = read(DataSection(train=write(tmp_path, rows), personal_data="ignore"), accepts=PROMPTS)
    assert not any("The rows hold" in note for note in ignoring.notes)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_personal_data_is_left_alone(tmp_path, text):
    rows = [{"prompt": words(n), "completion": f"{text} {n}"} for n in range(40)]
    assert not any(
        "The rows hold" in note for note in read(DataSection(train=write(tmp_path, rows)), accepts=PROMPTS).notes
    )


def test_masking_hides_every_secret():
    text = " and ".join(secret for found in SECRETS.values() for secret in found)
    hidden = personal.without(text)
    assert not any(secret in hidden for found in SECRETS.values() for secret in found if secret[0] != "张")


def shingles(key):
    words_of = key.split()
    return {tuple(words_of[start : start + 3]) for start in range(len(words_of) - 2)}


@pytest.mark.parametrize("seed", range(20))
def test_near_duplicates_are_exactly_those_of_the_definition(seed):
    chance = random.Random(seed)
    vocabulary = ["the", "a", "cat", "dog", "eats", "sits", "big", "red", "house", "in", "on", "at", "with"]
    base = [[chance.choice(vocabulary) for _ in range(chance.randint(1, 40))] for _ in range(6)]

    def variant():
        found = list(chance.choice(base))
        for _ in range(chance.randint(0, 2)):
            found[chance.randrange(len(found))] = chance.choice(vocabulary)
        return " ".join(found)

    left, right = [variant() for _ in range(9)], [variant() for _ in range(9)]
    found = {pair.left: pair.likeness for pair in similar.pairs_between(left, right)}
    for index, one in enumerate(left):
        best = 0.0
        for other in right:
            a, b = shingles(one), shingles(other)
            best = max(best, 1.0 if one == other else len(a & b) / max(1, len(a | b)))
        assert found.get(index) == (pytest.approx(best) if 5 * best >= 4 - 1e-9 else None)


def test_chinese_near_duplicates_go_by_characters():
    one = "今天我们去公园散步，看到了很多漂亮的花和小鸟。"
    (pair,) = similar.pairs_between([one, "完全不同的句子"], ["昨天下雨了", one.replace("。", "呢！")])
    assert (pair.left, pair.right, pair.exact) == (0, 1, False)
    assert list(similar.clusters([one, one.replace("，", " "), "别的"])) == [0, 0, 2]


def test_a_common_instruction_makes_no_duplicates():
    instruction = words(0, 60)
    questions = [f"{instruction} {words(n, 4)}" for n in range(1, 61)]
    assert list(similar.clusters(questions)) == list(range(60))
    assert similar.pairs_between(questions[:30], questions[30:]) == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Where is my card?", "where is  my CARD", True),
        ("ＡＢＣ，好", "abc 好", True),
        ("don't stop-go", "dont stop go", True),
        ("What is 2 + 3?", "What is 2 - 3?", False),
        ("costs 3.5 euros", "costs 35 euros", False),
        ("good 😀", "good 😡", False),
    ],
)
def test_what_counts_as_the_same_text(one, other, same):
    assert (normalised(one) == normalised(other)) is same
