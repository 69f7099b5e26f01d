"""What every task promises, for every tiny model that it fits.

Shapes: B rows, T tokens, V vocabulary.
"""

import copy
import random
from types import SimpleNamespace

import pytest
import tiny
import torch

from metier import models, tasks
from metier.core import DataError, ModelError, RecipeError
from metier.data.records import Completion, Conversation, Document, Labelled, Message
from metier.recipe import ChatTask, ClassifyTask, CompleteTask, ModelSection
from metier.tasks import Answering, causal, generation
from metier.training import Precision, train_step

LABELS = ("billing", "delivery", "账户 更新")
PRECISION = Precision("fp32", torch.device("cpu"))
MARKERS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
END = "<|im_end|>"


def turns(where, *texts, system=None):
    """A conversation whose turns alternate between user and assistant."""
    roles = ("user", "assistant")
    head = () if system is None else (Message("system", system),)
    return Conversation(where, (*head, *(Message(roles[i % 2], text) for i, text in enumerate(texts))))


CHATS = (
    turns("a.jsonl:1", "Where is my parcel?", "It is near the door."),
    turns("a.jsonl:2", "I was charged twice.", "Sorry!", "And now?", "We refund 1 payment. 🙂", system="You are a helpful assistant."),
    turns("a.jsonl:3", "我的包裹还没有到。", "请看物流页面。👩‍👩‍👧 明天到。"),
    turns("a.jsonl:4", "x", "y"),
    Completion("a.jsonl:5", "How do I change the address of my next delivery?", '{"intent": "delivery"}'),
)  # fmt: skip
PAIRS = (
    Completion("p.jsonl:1", "The cat sat", " on the mat and the dog lay on the rug."),
    Completion("p.jsonl:2", "def add(a, b):\n", "    return a + b\n"),
    Completion("p.jsonl:3", "今天天气", "很好,我们去公园散步。🙂"),
    Completion("p.jsonl:4", "I was charged twice for the same order and now I wonder", " why"),
)
TEXTS = (
    Document("t.jsonl:1", "The parcel has not arrived yet."),
    Document("t.jsonl:2", "In 2026 there were 1234567890 orders, 365 days and 24 hours. " * 2),
    Document("t.jsonl:3", "今天天气很好 🙂"),
    Document("t.jsonl:4", "a"),
)
SORTED = (
    Labelled("l.jsonl:1", "I was charged twice for the same order.", "billing"),
    Labelled("l.jsonl:2", "Where is it?", "delivery"),
    Labelled("l.jsonl:3", "我的包裹还没有到,物流页面没有更新。我想换一个地址。", "账户 更新"),
    Labelled("l.jsonl:4", "How do I change the address of my next delivery before it leaves the house?", "delivery"),
)
ROWS = {"chat": CHATS, "text": TEXTS, "prompt": PAIRS, "middle": (*TEXTS, *PAIRS), "label": SORTED}
CASES = (
    *((f"chat-{name}", name, ChatTask(), "chat") for name in tiny.CHAT),
    ("chat-last-llama", "llama", ChatTask(supervise="last", system="Reply."), "chat"),
    ("chat-t5", "t5", ChatTask(), "chat"),
    *((f"text-{name}", name, CompleteTask(), "text") for name in ("gpt2", "llama")),
    *((f"prompt-{name}", name, CompleteTask(), "prompt") for name in tiny.CAUSAL),
    ("middle-llama", "llama", CompleteTask(middle_share=1.0), "middle"),
    *((f"head-{name}", name, ClassifyTask(way="head"), "label") for name in (*tiny.ENCODERS, "llama", "gpt2")),
    *((f"words-{name}", name, ClassifyTask(), "label") for name in ("llama", "gemma3", "gpt2")),
)
every_case = pytest.mark.parametrize("case", [case[0] for case in CASES], indirect=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.make(name, root / name) for name in tiny.NAMES}


@pytest.fixture(scope="module")
def prepared(folders):
    """Load a tiny model with the head its task needs, and build the task; both once for each question."""
    seen = {}

    def prepare(name, section):
        if (name, section) not in seen:
            native = {"t5": "seq2seq"} | dict.fromkeys(tiny.ENCODERS, "classifier")
            head = tasks.head_for(section, native.get(name, "causal"))
            model = models.load(ModelSection(base=str(folders[name])), head=head, labels=LABELS)
            if isinstance(section, CompleteTask) and section.middle_share:
                model.tokenizer.add_tokens(list(MARKERS), special_tokens=True)
                model.module.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
            task = tasks.build(section, model.tokenizer, head=head, labels=LABELS, context=tiny.CONTEXT, seed=0)
            task = task.suited(model.module)
            seen[name, section] = SimpleNamespace(task=task, module=model.module, tokenizer=model.tokenizer, head=head)
        return seen[name, section]

    return prepare


@pytest.fixture
def case(request, prepared):
    _, name, section, rows = next(case for case in CASES if case[0] == request.param)
    found = prepared(name, section)
    records = ROWS[rows]
    return SimpleNamespace(**vars(found), records=records, examples=found.task.encode(records, training=True))


@pytest.fixture
def chat(prepared):
    return prepared("llama", ChatTask())


def learnt(shown):
    """The pieces of an example that are learnt."""
    return [text for text, is_learnt in shown.parts if is_learnt]


def replies(record):
    if isinstance(record, Completion):
        return [record.completion]
    return [turn.content for turn in record.messages if turn.role == "assistant"]


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def build_chat(tokenizer, **words):
    return tasks.build(ChatTask(**words), tokenizer, head="causal", labels=(), context=tiny.CONTEXT, seed=0)


def taught(found, examples, *, steps=60, rate=1e-2):
    """A copy of the network after some steps on all examples at once, and the losses on the way."""
    module = copy.deepcopy(found.module).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    torch.manual_seed(0)
    losses = [
        train_step(module, found.task, [found.task.collate(examples)], optimizer, precision=PRECISION, max_grad_norm=1)[
            0
        ]
        for _ in range(steps)
    ]
    return module.eval(), losses


# ------------------------------------------------------------------------------------------------ the loss is a sum


@every_case
def test_company_and_padding_change_no_loss(case):
    order = list(range(len(case.examples)))
    random.Random(1).shuffle(order)
    together = case.task.loss(case.module, case.task.collate([case.examples[i] for i in order]))
    for place, i in enumerate(order):
        alone = case.task.loss(case.module, case.task.collate([case.examples[i]]))
        torch.testing.assert_close(together.total_B[place], alone.total_B[0], rtol=2e-5, atol=1e-5)
        assert together.weight_B[place] == alone.weight_B[0] > 0


@every_case
def test_score_finds_the_same_loss_in_the_order_given(case):
    found = tasks.score(case.task, case.module, case.examples, batch_tokens=64)
    for place, example in enumerate(case.examples):
        alone = case.task.loss(case.module, case.task.collate([example]))
        torch.testing.assert_close(found.total_B[place], alone.total_B[0].double(), rtol=2e-5, atol=1e-5)
        assert found.weight_B[place] == alone.weight_B[0]
    assert not case.module.training


@every_case
def test_how_a_step_is_cut_changes_no_gradient(case):
    count = len(case.examples)
    cuts = [[range(count)], [[i] for i in range(count)], [[count - 1, 0], range(1, count - 1)]]
    results = []
    for cut in cuts:
        module = copy.deepcopy(case.module)
        batches = (case.task.collate([case.examples[i] for i in group]) for group in cut)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        told = train_step(module, case.task, batches, optimizer, precision=PRECISION, max_grad_norm=1e9)
        results.append((told, dict(module.named_parameters())))
    (told, whole), *others = results
    before = dict(case.module.named_parameters())
    assert any(not torch.equal(whole[name], before[name]) for name in before)
    for other_told, other in others:
        assert other_told == pytest.approx(told, rel=1e-4)
        for name, parameter in whole.items():
            torch.testing.assert_close(other[name], parameter, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@every_case
def test_the_loop_learns(case):
    _, losses = taught(case, case.examples, steps=12)
    assert losses[-1] < 0.8 * losses[0]


@every_case
def test_an_example_is_shown_with_something_learnt_and_its_place(case):
    for example in case.examples:
        shown = case.task.show(example)
        assert learnt(shown)
        assert shown.where in {record.where for record in case.records}
        assert case.task.size(example) > 0


@every_case
def test_a_row_is_asked_answered_and_given_another_answer(case):
    answers = case.task.answer(case.module, case.records, Answering(max_new_tokens=4, batch_tokens=200))
    assert len(answers) == len(case.records)
    assert all(isinstance(answer, str) for answer in answers)
    for record in case.records:
        other = case.task.with_answer(record, LABELS[0])
        assert case.task.reference(other) == LABELS[0]
        if not isinstance(record, Document):
            assert case.task.question(other) == case.task.question(record) != ""
        assert case.task.encode([other], training=False)


@every_case
def test_the_reference_is_not_looked_at(case):
    if isinstance(case.records[0], Document):
        pytest.skip("plain text asks nothing")
    how = Answering(max_new_tokens=8)
    others = [case.task.with_answer(record, LABELS[1]) for record in case.records]
    assert case.task.answer(case.module, case.records, how) == case.task.answer(case.module, others, how)


@every_case
def test_nothing_answers_nothing(case):
    assert case.task.answer(case.module, [], Answering(max_new_tokens=2)) == []
    assert case.task.encode([], training=True) == []


@every_case
def test_rows_of_another_task_are_refused_with_their_place(case):
    foreign = Document("f.jsonl:7", "text") if case.task.kind != "complete" else SORTED[0]
    with pytest.raises(DataError) as caught:
        case.task.encode([foreign], training=True)
    assert caught.value.faults[0].where == foreign.where


# ------------------------------------------------------------------------------------------------ off by one


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral"])
@torch.no_grad()
def test_the_loss_is_the_one_computed_by_hand(prepared, name):
    found = prepared(name, ChatTask())
    (row,) = found.task.encode([CHATS[1]], training=True)
    with torch.no_grad():
        logits_TV = found.module(input_ids=row.ids[None]).logits[0].double()
    logp_TV = torch.log_softmax(logits_TV, dim=-1)
    by_hand = -sum(float(logp_TV[t - 1, row.ids[t]]) for t in range(len(row.ids)) if row.learnt[t])
    loss = found.task.loss(found.module, found.task.collate([row]))
    assert loss.total_B[0].item() == pytest.approx(by_hand, rel=1e-6)
    assert float(loss.weight_B[0]) == int(row.learnt.sum())


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_the_head_is_computed_only_where_something_is_learnt(prepared, name):
    known = prepared(name, CompleteTask())
    module, task = copy.deepcopy(known.module), known.task
    if name == "gemma3":
        module.config.final_logit_softcapping = 3.0  # scores are bent after the head
    batch = task.collate(task.encode(PAIRS, training=False))
    seen = []
    head = module.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, out: seen.append(out.shape[:-1].numel()))
    found = causal.predict(module, batch)
    hook.remove()
    assert seen == [len(batch["place"])]
    assert not head._forward_pre_hooks
    given = {name: batch[name] for name in causal.ARGUMENTS if name in batch}
    whole = module(**given).logits.flatten(0, 1)[batch["place"]]
    torch.testing.assert_close(found.logits_NV, whole, rtol=1e-5, atol=1e-5)
    assert found.logits_NV.abs().max() < 3.0 or name != "gemma3"


@torch.no_grad()
def test_the_loss_of_plain_text_covers_all_but_its_first_token(prepared):
    found = prepared("gpt2", CompleteTask())
    (row,) = found.task.encode([TEXTS[0]], training=True)
    assert found.tokenizer.decode(row.ids) == TEXTS[0].text + "<|endoftext|>"
    labels = found.module(input_ids=row.ids[None], labels=row.ids[None]).loss
    loss = found.task.loss(found.module, found.task.collate([row]))
    assert float(loss.weight_B[0]) == len(row.ids) - 1
    assert float(loss.total_B[0] / loss.weight_B[0]) == pytest.approx(float(labels), rel=1e-5)


@torch.no_grad()
def test_the_loss_of_t5_is_the_one_of_transformers(prepared):
    found = prepared("t5", ChatTask())
    examples = found.task.encode(CHATS, training=True)
    batch = found.task.collate(examples)
    theirs = found.module(input_ids=batch["ids"], attention_mask=batch["mask"], labels=batch["reply"]).loss
    ours = found.task.loss(found.module, batch)
    assert float(ours.total_B.sum() / ours.weight_B.sum()) == pytest.approx(float(theirs), rel=1e-5)
    assert [int(n) for n in ours.weight_B] == [len(example.reply) for example in examples]


def test_t5_reads_its_prefix_and_learns_the_reply_with_its_end(prepared):
    found = prepared("t5", ChatTask(system="translate: "))
    ((prompt, _), (reply, _)) = found.task.show(found.task.encode([CHATS[2]], training=True)[0]).parts
    assert prompt == "translate: 我的包裹还没有到。</s> -> "
    assert reply == "请看物流页面。👩‍👩‍👧 明天到。</s>"


# ------------------------------------------------------------------------------------------------ exactly the reply

TRICKY = (
    *CHATS,
    turns("t:1", "a\n\nb", " two words "),
    turns("t:2", "q", "line one\nline two\n"),
    turns("t:3", "assistant\nuser", "assistant"),
    turns("t:4", "same", "same", "same", "same"),
    turns("t:5", "e\u0301 é", "e\u0301 é"),
    turns("t:6", "表情", "🙂🙂"),
    turns("t:7", "<b>", "&amp; </s> [END]"),
)


@pytest.mark.parametrize("name", tiny.CHAT)
@pytest.mark.parametrize("system", [None, "请简短。"])
@pytest.mark.parametrize("record", TRICKY, ids=lambda record: record.where)
def test_the_replies_and_their_end_tokens_are_learnt_and_nothing_else(prepared, name, system, record):
    found = prepared(name, ChatTask(system=system))
    (row,) = found.task.encode([record], training=True)
    shown = found.task.show(row)
    assert learnt(shown) == [reply + END for reply in replies(record)]
    whole = "".join(text for text, _ in shown.parts)
    has_own = isinstance(record, Conversation) and record.messages[0].role == "system"
    assert whole.count("<|im_start|>system") == int(has_own or system is not None)
    assert ("请简短。" in whole) == (system is not None and not has_own)


@pytest.mark.parametrize("name", tiny.CHAT)
@pytest.mark.parametrize("record", TRICKY, ids=lambda record: record.where)
def test_the_model_is_asked_with_the_very_tokens_that_stood_before_the_reply(prepared, name, record):
    found = prepared(name, ChatTask(supervise="last"))
    (row,) = found.task.encode([record], training=True)
    first = int(row.learnt.nonzero()[0])
    assert found.task.prompt(record).tolist() == row.ids[:first].tolist()


def test_only_the_last_reply_is_learnt_where_asked(prepared):
    found = prepared("llama", ChatTask(supervise="last"))
    (row,) = found.task.encode([CHATS[1]], training=True)
    assert learnt(found.task.show(row)) == ["We refund 1 payment. 🙂" + END]


def test_what_a_tool_says_is_not_learnt(chat):
    record = Conversation(
        "a:1", (Message("user", "time?"), Message("assistant", "call"), Message("tool", "12:00"), Message("assistant", "noon"))
    )  # fmt: skip
    (row,) = chat.task.encode([record], training=True)
    assert learnt(chat.task.show(row)) == ["call" + END, "noon" + END]


def test_the_end_of_a_text_is_learnt_though_padding_may_be_the_same_token(prepared):
    found = prepared("gpt2", CompleteTask())
    assert found.tokenizer.pad_token_id == found.tokenizer.eos_token_id
    examples = found.task.encode(PAIRS, training=True)
    for record, example in zip(PAIRS, examples, strict=True):
        assert learnt(found.task.show(example)) == [record.completion + "<|endoftext|>"]
    weights = found.task.loss(found.module, found.task.collate(examples)).weight_B
    assert [int(n) for n in weights] == [int(example.learnt.sum()) for example in examples]


def test_a_label_is_learnt_after_its_text(prepared):
    found = prepared("llama", ClassifyTask())
    for record, example in zip(SORTED, found.task.encode(SORTED, training=True), strict=True):
        shown = found.task.show(example)
        assert learnt(shown) == [f" {record.label}{END}"]
        assert shown.parts[0][0] == f"{record.text}\nLabel:"


# ------------------------------------------------------------------------------------------------ templates

REASONING = r"""
{%- set seen = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set seen.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > seen.last -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}
    {{- m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' + opening -}}{%- endif -%}
"""
"""As published reasoning models do: the thoughts of earlier turns are dropped once the user speaks again."""
THOUGHTFUL = turns("r.jsonl:4", "1+1?", "<think>\neasy\n</think>\n\n2", "2+2?", "<think>\nhard\n</think>\n\n4")


@pytest.mark.parametrize("opening", ["", "<think>\\n", "<think>\\n\\n</think>\\n\\n"])
def test_dropped_reasoning_gives_one_row_for_each_reply(chat, opening):
    task = build_chat(with_template(chat.tokenizer, "{%- set opening = '" + opening + "' -%}" + REASONING))
    rows = task.encode([THOUGHTFUL], training=True)
    told = [task.show(row) for row in rows]
    assert [len(learnt(shown)) for shown in told] == [1, 1]
    skipped = "<think>\n" if opening else ""
    assert [learnt(shown)[0] for shown in told] == [
        f"<think>\neasy\n</think>\n\n2{END}".removeprefix(skipped),
        f"<think>\nhard\n</think>\n\n4{END}".removeprefix(skipped),
    ]
    assert {row.where for row in rows} == {"r.jsonl:4"}
    # The second reply is learnt after the first one as the model will meet it: without its thoughts.
    assert "easy" not in told[1].parts[0][0]
    assert f"assistant\n2{END}" in told[1].parts[0][0]


def test_the_last_reply_of_a_reasoning_conversation_is_one_row(chat):
    task = build_chat(with_template(chat.tokenizer, "{%- set opening = '' -%}" + REASONING), supervise="last")
    (row,) = task.encode([THOUGHTFUL], training=True)
    assert learnt(task.show(row)) == [f"<think>\nhard\n</think>\n\n4{END}"]


def test_a_template_without_an_end_of_turn_is_refused(chat):
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    task = build_chat(with_template(chat.tokenizer, plain))
    with pytest.raises(DataError, match="end-of-turn") as caught:
        task.encode(CHATS, training=True)
    assert [fault.where for fault in caught.value.faults] == [record.where for record in CHATS]


def test_a_template_that_opens_a_reply_otherwise_is_refused(chat):
    odd = tiny.CHATML.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>bot\\n' }}{% endif")
    assert odd != tiny.CHATML
    with pytest.raises(ModelError, match="generation prompt"):
        build_chat(with_template(chat.tokenizer, odd)).encode(CHATS, training=True)


def test_a_template_that_refuses_a_conversation_is_quoted_with_the_row(chat):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.CHATML
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*no system turn"):
        build_chat(with_template(chat.tokenizer, strict)).encode(CHATS, training=True)


def test_a_template_may_come_from_a_file(chat, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(tiny.CHATML.replace("<|im_start|>", "<|im_start|>@"), "utf-8")
    tokenizer = with_template(chat.tokenizer, None)
    task = build_chat(tokenizer, template=str(path))
    shown = task.show(task.encode([CHATS[0]], training=True)[0])
    assert shown.parts[0][0].startswith("<|im_start|>@user\nWhere")
    with pytest.raises(RecipeError, match="no such file"):
        build_chat(tokenizer, template=str(tmp_path / "none.jinja"))


def test_a_model_without_a_chat_template_cannot_chat(prepared):
    tokenizer = prepared("gpt2", CompleteTask()).tokenizer
    with pytest.raises(RecipeError, match="no chat template") as caught:
        build_chat(tokenizer)
    assert "task.template" in caught.value.faults[0].hint
    assert "task=complete" in caught.value.faults[0].hint


# ------------------------------------------------------------------------------------------------ rows that cannot be learnt


@pytest.mark.parametrize(("name", "section"), [("llama", ChatTask), ("t5", ChatTask), ("gpt2", CompleteTask)])
def test_rows_that_are_too_long_are_refused_with_their_lines_or_dropped(prepared, name, section):
    rows = [*PAIRS, Completion("p.jsonl:5", "word " * 300, "ok"), Completion("p.jsonl:6", "q", "word " * 300)]
    found = prepared(name, section(max_tokens=100))
    with pytest.raises(DataError, match=r"task\.max_tokens is 100") as caught:
        found.task.encode(rows, training=True)
    assert [fault.where for fault in caught.value.faults] == ["p.jsonl:5", "p.jsonl:6"]
    dropping = prepared(name, section(max_tokens=100, too_long="drop"))
    assert [row.where for row in dropping.task.encode(rows, training=True)] == [record.where for record in PAIRS]


def test_a_row_of_exactly_the_longest_length_is_kept(prepared):
    row = prepared("llama", ChatTask()).task.encode([CHATS[1]], training=True)[0]
    fitting = prepared("llama", ChatTask(max_tokens=len(row.ids))).task
    assert len(fitting.encode([CHATS[1]], training=True)) == 1
    with pytest.raises(DataError):
        prepared("llama", ChatTask(max_tokens=len(row.ids) - 1)).task.encode([CHATS[1]], training=True)


def test_more_tokens_than_the_context_are_refused(chat):
    with pytest.raises(RecipeError, match=r"513 tokens are more than the model's context of 512"):
        build_chat(chat.tokenizer, max_tokens=tiny.CONTEXT + 1)


def test_rows_without_anything_to_learn_are_refused(chat):
    silent = tiny.CHATML.replace("message['content']", "(message['content'] if message['role'] != 'assistant' else '')")
    silent = silent.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'assistant' %}"
    )
    task = build_chat(with_template(chat.tokenizer, silent))
    with pytest.raises((DataError, ModelError)) as caught:
        task.encode([CHATS[0], CHATS[2]], training=True)
    assert caught.value.faults[0].where == "a.jsonl:1"


@pytest.mark.parametrize("supervise", ["replies", "last"])
def test_a_conversation_without_a_reply_is_refused(prepared, supervise):
    task = prepared("llama", ChatTask(supervise=supervise)).task
    asked = Conversation("a.jsonl:9", (Message("user", "Hello?"),))
    with pytest.raises(DataError, match="nothing in this row is learnt") as caught:
        task.encode([CHATS[0], asked, CHATS[1], replace_where(asked, "a.jsonl:11")], training=True)
    assert [fault.where for fault in caught.value.faults] == ["a.jsonl:9", "a.jsonl:11"]


def replace_where(conversation, where):
    return Conversation(where, conversation.messages)


def test_labels_that_do_not_exist_are_refused_with_their_lines(prepared):
    strange = [SORTED[0], Labelled("l.jsonl:8", "x", "refund"), Labelled("l.jsonl:9", "x", "Billing")]
    for name in ("bert", "llama"):
        with pytest.raises(DataError, match="not among the classes") as caught:
            prepared(name, ClassifyTask()).task.encode(strange, training=True)
        assert [fault.where for fault in caught.value.faults] == ["l.jsonl:8", "l.jsonl:9"]


@pytest.mark.parametrize(
    "text",
    ["word " * 500, "我的包裹还没有到,物流页面没有更新。" * 40, "🙂 " * 300],
    ids=["english", "chinese", "emoji"],
)
@pytest.mark.parametrize(
    ("name", "way"), [("bert", "head"), ("roberta", "head"), ("llama", "words"), ("gpt2", "words")]
)
def test_long_texts_are_cut_and_their_label_never(prepared, name, way, text):
    found = prepared(name, ClassifyTask(way=way, max_tokens=64))
    (row,) = found.task.encode([Labelled("l.jsonl:1", text, "delivery")], training=True)
    assert 40 <= found.task.size(row) <= 64
    shown = found.task.show(row)
    assert "delivery" in learnt(shown)[0]
    if way == "words":
        assert shown.parts[0][0].endswith("\nLabel:")


# ------------------------------------------------------------------------------------------------ plain text and middles


def test_long_plain_text_becomes_windows_that_cover_it(prepared):
    found = prepared("llama", CompleteTask(max_tokens=32))
    text = "".join(tiny.SENTENCES)
    windows = found.task.encode([Document("t:1", text)], training=True)
    assert len(windows) > 3
    assert max(len(window.ids) for window in windows) == 32
    assert found.tokenizer.decode(torch.cat([window.ids for window in windows])) == text + END
    assert all(not window.learnt[0] and bool(window.learnt[1:].all()) for window in windows)


def test_a_middle_is_learnt_after_its_prefix_and_suffix(prepared):
    found = prepared("llama", CompleteTask(middle_share=1.0))
    rows = ROWS["middle"]
    for record, example in zip(rows, found.task.encode(rows, training=True), strict=True):
        shown = found.task.show(example)
        text = record.text if isinstance(record, Document) else record.prompt + record.completion
        ((before, _), (middle, _)) = shown.parts
        prefix, suffix = before.removeprefix(MARKERS[0]).removesuffix(MARKERS[2]).split(MARKERS[1])
        assert middle.endswith(END)
        assert prefix + middle.removesuffix(END) + suffix == text


def test_middles_are_for_training_only_and_for_their_share(prepared):
    found = prepared("llama", CompleteTask(middle_share=0.5))
    rows = [Document(f"t:{i}", "The cat sat on the mat.") for i in range(200)]
    turned = [MARKERS[0] in str(found.tokenizer.decode(row.ids)) for row in found.task.encode(rows, training=True)]
    assert 70 <= sum(turned) <= 130
    again = [MARKERS[0] in str(found.tokenizer.decode(row.ids)) for row in found.task.encode(rows, training=True)]
    assert turned == again
    assert not any(
        MARKERS[0] in str(found.tokenizer.decode(row.ids)) for row in found.task.encode(rows, training=False)
    )


def test_middles_need_their_markers(chat):
    words = {"head": "causal", "labels": (), "context": tiny.CONTEXT, "seed": 0}
    with pytest.raises(RecipeError, match="no fill-in-the-middle tokens"):
        tasks.build(CompleteTask(middle_share=0.5), chat.tokenizer, **words)
    with pytest.raises(RecipeError, match=r"task\.middle_tokens.*not tokens"):
        tasks.build(CompleteTask(middle_share=0.5, middle_tokens=("<a>", "<b>", "<c>")), chat.tokenizer, **words)


# ------------------------------------------------------------------------------------------------ task meets model


@pytest.mark.parametrize(
    ("section", "native", "head"),
    [
        (ChatTask(), "causal", "causal"),
        (ChatTask(), "seq2seq", "seq2seq"),
        (CompleteTask(), "causal", "causal"),
        (ClassifyTask(), "causal", "causal"),
        (ClassifyTask(way="head"), "causal", "classifier"),
        (ClassifyTask(), "classifier", "classifier"),
        (ClassifyTask(), "seq2seq", "classifier"),
    ],
)
def test_a_task_gets_the_head_it_needs(section, native, head):
    assert tasks.head_for(section, native) == head


@pytest.mark.parametrize(
    ("section", "native", "where"),
    [
        (ChatTask(), "classifier", "task"),
        (CompleteTask(), "classifier", "task"),
        (CompleteTask(), "seq2seq", "task"),
        (ClassifyTask(way="words"), "classifier", "task.way"),
    ],
)
def test_a_task_that_a_model_cannot_do_is_refused(section, native, where):
    with pytest.raises(RecipeError) as caught:
        tasks.head_for(section, native)
    assert caught.value.faults[0].where == where
    assert caught.value.faults[0].hint


def test_a_classification_template_must_hold_the_text(chat):
    with pytest.raises(RecipeError, match=r"no \{text\}"):
        tasks.build(ClassifyTask(template="Label:"), chat.tokenizer, head="causal", labels=LABELS, context=512, seed=0)


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_ranking_with_a_cache_is_ranking_without(prepared, name):
    found = prepared(name, ClassifyTask())
    texts = (*SORTED, Labelled("l:9", "The parcel has not arrived yet. " * 8, "billing"))
    prompts = [found.task.prompt(record) for record in texts]
    candidates = [found.task.candidate(label) for label in (*LABELS, "x", "a much longer label, 更长")]
    cached_BK = generation.rank(found.module, prompts, candidates, batch_tokens=8192)
    with torch.inference_mode():
        plain_BK = torch.stack(
            [generation._rank_plainly(found.module, p, candidates, 8192, torch.device("cpu")) for p in prompts]
        )
    torch.testing.assert_close(cached_BK, plain_BK, rtol=1e-4, atol=1e-4)
    for row, record in enumerate(texts):
        loss = found.task.loss(found.module, found.task.collate(found.task.encode([record], training=False)))
        torch.testing.assert_close(cached_BK[row, LABELS.index(record.label)], -loss.total_B[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_candidates_of_one_token_are_ranked_too(prepared, name):
    found = prepared(name, CompleteTask())
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([9])]
    scores_BK = generation.rank(found.module, prompts, [torch.tensor([i]) for i in range(40)], batch_tokens=64)
    for prompt, scores_K in zip(prompts, scores_BK, strict=True):
        with torch.no_grad():
            logp_V = torch.log_softmax(found.module(input_ids=prompt[None]).logits[0, -1], dim=-1)
        torch.testing.assert_close(scores_K, logp_V[:40], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*tiny.CAUSAL, "t5"])
def test_many_prompts_are_answered_as_one_by_one(prepared, name):
    found = prepared(name, ChatTask() if name == "t5" else CompleteTask())
    texts = (*PAIRS, Completion("p:9", "The parcel has not arrived yet. " * 9, "x"), Completion("p:10", "a", "x"))
    module, _ = taught(found, found.task.encode(texts, training=True), steps=15)
    how = Answering(max_new_tokens=12)
    together = found.task.answer(module, texts, how)
    assert together == [found.task.answer(module, [text], how)[0] for text in texts]
    assert together == found.task.answer(module, texts, Answering(max_new_tokens=12, batch_tokens=60))
    assert len(set(together)) > 1


@pytest.mark.parametrize("name", [*tiny.CHAT, "t5"])
def test_what_was_learnt_by_heart_is_answered_to_the_letter_and_ends(prepared, name):
    found = prepared(name, ChatTask())
    rows = (CHATS[0], CHATS[3], CHATS[2])
    module, losses = taught(found, found.task.encode(rows, training=True), steps=300 if name == "t5" else 120)
    assert losses[-1] < 0.05
    answers = found.task.answer(module, rows, Answering(max_new_tokens=100))
    assert answers == [found.task.reference(row) for row in rows]


def test_a_classifier_that_learnt_its_rows_answers_them(prepared):
    for name in ("bert", "roberta", "llama"):
        found = prepared(name, ClassifyTask())
        module, _ = taught(found, found.task.encode(SORTED, training=True))
        assert found.task.answer(module, SORTED, Answering()) == [row.label for row in SORTED]


def test_an_answer_is_no_longer_than_allowed(chat):
    # An untrained network hardly ever says the end token.
    tokens = generation.greedy(
        chat.module, chat.tokenizer, [chat.task.prompt(row) for row in CHATS], Answering(max_new_tokens=7), stops=[]
    )
    assert [len(answer) for answer in tokens] == [7] * len(CHATS)


@pytest.mark.parametrize("name", tiny.CHAT)
def test_only_allowed_answers_are_given(prepared, name):
    found = prepared(name, ChatTask())
    allowed = ("refund", "refund now", "换货", "🙂", "keep")
    answers = found.task.answer_among(found.module, CHATS, Answering(max_new_tokens=40), allowed)
    assert set(answers) <= set(allowed)
    # Even what the network learnt to say gives way.
    module, _ = taught(found, found.task.encode(CHATS, training=True), steps=40)
    assert set(found.task.answer_among(module, CHATS, Answering(max_new_tokens=40), allowed)) <= set(allowed)
    for only in allowed:
        assert set(found.task.answer_among(module, CHATS[:2], Answering(max_new_tokens=40), (only,))) == {only}


def test_a_trie_says_what_may_follow():
    trie = generation.Trie.of([(1, 2, 9), (1, 3, 9), (4, 9)])
    assert trie.after == {(): [1, 4], (1,): [2, 3], (1, 2): [9], (1, 3): [9], (4,): [9]}


def test_an_open_conversation_is_answered(chat):
    rows = (CHATS[0], CHATS[3])
    module, _ = taught(chat, chat.task.encode(rows, training=True), steps=100)
    assert chat.task.reply(module, CHATS[0].messages[:1], Answering()) == "It is near the door."


def test_sampling_habits_of_a_checkpoint_are_switched_off(chat):
    module = copy.deepcopy(chat.module)
    module.generation_config.update(do_sample=True, temperature=5.0, top_p=0.5, top_k=3, repetition_penalty=3.0)
    how = Answering(max_new_tokens=10)
    torch.manual_seed(0)
    assert chat.task.answer(module, CHATS, how) == chat.task.answer(chat.module, CHATS, how)
