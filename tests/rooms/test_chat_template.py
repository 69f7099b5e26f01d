"""Chat templates give what transformers gives, and end: in time, in memory, and without Python's insides."""

import subprocess

import pytest
import tiny

from metier.core import DataError, UnsafeError
from metier.models import chat_template, render_chat

TURNS = [
    {"role": "system", "content": "Be brief. <b>&</b>"},
    {"role": "user", "content": "What is 1 + 1?\n"},
    {"role": "assistant", "content": "二 \U0001f600"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}},
    }
]
HONEST = {
    "loop": "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "opening": "{{ bos_token }}{% if add_generation_prompt %}go{% else %}stop{% endif %}",
    "tools": "{% if tools %}{{ tools | tojson }}{{ tools[0] | tojson(indent=2) }}{% endif %}{{ documents }}",
    "namespace": "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{{ d.get('b') }}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}\n  {% generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "macro": "{% macro show(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}{{ messages | length }}{{ 'a' | upper }}{{ [3, 1] | sort }}",
    "slices": "{% for m in messages[1:] | reverse %}{{ m.content.split(' ')[-1].strip() }}{% endfor %}{{ messages[0].content[:4] }}",
    "blanks": "  {%- if true -%}  x  {%- endif %}\n\n    {% if true %}\n  y\n    {% endif %}\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return tiny._tokenizer("llama")


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("opening", [False, True])
def test_the_text_is_transformers_own(tokenizer, name, opening):
    tokenizer.chat_template = HONEST[name]
    wanted = tokenizer.apply_chat_template(TURNS, tools=TOOLS, tokenize=False, add_generation_prompt=opening)
    assert render_chat(tokenizer, TURNS, tools=TOOLS, opening=opening) == wanted


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro again() %}{% for i in range(100000) %}{{ again() }}{% endfor %}{% endmacro %}{{ again() }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ 'a' | center(10 ** 12) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ [0] * 10 ** 11 }}",
        "{% set ns = namespace(t='ab') %}{% for i in range(100) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
        "{% set ns = namespace(t='ab') %}{% for i in range(100) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    ],
)
def test_what_does_not_end_is_ended(tokenizer, template, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 5)
    monkeypatch.setattr(chat_template, "_WORKER", worker := chat_template._Worker())
    tokenizer.chat_template = template
    with pytest.raises((UnsafeError, DataError)) as caught:
        render_chat(tokenizer, TURNS)
    assert "chat template" in str(caught.value)
    tokenizer.chat_template = HONEST["loop"]
    assert "<|user|>" in render_chat(tokenizer, TURNS)  # the next row is answered again
    worker.close()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__['os'].system('true') }}",
        "{{ messages.append({}) }}",
        "{{ namespace(__class__=1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_what_reaches_for_pythons_insides_is_refused(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(UnsafeError, match="reaches for what no template needs") as caught:
        render_chat(tokenizer, TURNS)
    assert caught.value.exit_code == 77


@pytest.mark.parametrize(
    "template",
    [
        "{{ (messages | first).__class__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ lipsum.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_what_only_looks_at_pythons_insides_sees_nothing(tokenizer, template):
    tokenizer.chat_template = template
    assert render_chat(tokenizer, TURNS) == ""


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% for %}", "Expected|Unexpected|unexpected"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ open('x') }}", "open"),
    ],
)
def test_a_template_that_refuses_says_why(tokenizer, template, said):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=said):
        render_chat(tokenizer, TURNS)


def test_the_process_is_begun_again_after_it_died(tokenizer):
    tokenizer.chat_template = "x"
    worker = chat_template._WORKER
    assert render_chat(tokenizer, TURNS) == "x"
    process = worker._process
    assert isinstance(process, subprocess.Popen)
    process.kill()
    process.wait()
    assert render_chat(tokenizer, TURNS) == "x"
    assert worker._process is not process
