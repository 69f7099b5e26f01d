"""Personal data and secrets in the rows: found by pattern and check digit, counted by kind, never repeated.

Patterns have no nested repetition, so each takes time linear in the text; cheap tests come before them.

Source: card numbers, ISO/IEC 7812-1 (Luhn); IBAN, ISO 13616 (mod 97); resident identity numbers, GB 11643-1999 (ISO
7064 MOD 11-2); e-mail domains that belong to nobody, RFC 2606; international numbers, ITU-T E.164 (at most 15 digits).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from metier.data.content import texts
from metier.data.records import Record


@dataclass(frozen=True, slots=True)
class Found:
    """One kind of personal data.

    Attributes:
        kind: What it is, in the plural.
        number: How often it was found.
        rows: In how many rows.
        samples: A few places with the find masked, such as "train.jsonl:4 (j…@…m)".
    """

    kind: str
    number: int
    rows: int
    samples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one kind is found: only texts that hold a hint are searched, and only finds that pass the check count."""

    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    check: Callable[[str], bool] = lambda _: True


SAMPLES = 3
RESERVED = (".example.com", ".example.org", ".example.net", ".example", ".test", ".invalid", ".localhost")


def find(records: Iterable[Record]) -> list[Found]:
    """Every kind of personal data in the records, most frequent first."""
    found: dict[str, Found] = {}
    for record in records:
        here: dict[str, list[str]] = {}
        for text in texts(record):
            for kind, it in _in_text(text):
                here.setdefault(kind, []).append(it)
        for kind, finds in here.items():
            so_far = found.get(kind, Found(kind, 0, 0, ()))
            samples = (*so_far.samples, f"{record.where} ({masked(finds[0])})")[:SAMPLES]
            found[kind] = Found(kind, so_far.number + len(finds), so_far.rows + 1, samples)
    return sorted(found.values(), key=lambda one: -one.number)


def holds(record: Record) -> bool:
    """Whether a record holds any kind of personal data."""
    return any(True for text in texts(record) for _ in _in_text(text))


def without(text: str) -> str:
    """The text with every find masked, for showing."""
    for _, found in list(_in_text(text)):
        text = text.replace(found, masked(found))
    return text


def masked(found: str) -> str:
    """The first and the last character, so that the owner can find the place and nobody else can use it."""
    return f"{found[0]}…{found[-1]}"


def _in_text(text: str) -> Iterator[tuple[str, str]]:
    many_digits = DIGITS.search(text) is not None
    for kind, how in KINDS.items():
        if any(hint in text for hint in how.hints) if how.hints else many_digits:
            finds = [match.group() for match in how.pattern.finditer(text) if how.check(match.group())]
            yield from ((kind, found) for found in finds)
            if finds:  # what one kind claims, such as an identity number, is no card number as well
                text = how.pattern.sub(lambda match: "\0" * len(match.group()), text)


def _digits(text: str) -> list[int]:
    return [int(character) for character in text if character.isdigit()]


def card(number: str) -> bool:
    """Whether the digits begin as an issuer's do, have its length, and pass the Luhn check."""
    digits = _digits(number)
    doubled = [digit if place % 2 == 0 else digit * 2 - 9 * (digit > 4) for place, digit in enumerate(digits[::-1])]
    return ISSUERS.fullmatch("".join(map(str, digits))) is not None and sum(doubled) % 10 == 0


def resident_id(number: str) -> bool:
    """Whether the last character of an 18-character Chinese resident identity number is right."""
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def iban(number: str) -> bool:
    """Whether an IBAN leaves 1 on division by 97."""
    plain = number.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _owned(address: str) -> bool:
    domain = "." + address.lower().rpartition("@")[2]
    return not domain.endswith(RESERVED)


def _international(number: str) -> bool:
    return 8 <= len(_digits(number)) <= 15


# ASCII digits throughout: \d would match digits of every script, which the check digits are not made for.
DIGITS = re.compile(r"[0-9](?:[ .()-]{0,2}[0-9]){8}")
TOKENS = (
    r"-----BEGIN (?:[A-Z]{2,12} )?PRIVATE KEY(?: BLOCK)?-----"
    r"|(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22}"
    r"|glpat-[A-Za-z0-9_-]{20}|hf_[A-Za-z0-9]{30}|sk-[A-Za-z0-9_-]{20,200}|xox[abprs]-[A-Za-z0-9-]{10}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{24}|npm_[A-Za-z0-9]{36}|pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50}"
    r"|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}|AIza[A-Za-z0-9_-]{35}|eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10})"
)
GITHUB_HINTS = ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_")
STORE_HINTS = ("k_live_", "k_test_", "npm_", "pypi-AgEIcHlwaS5vcmc")
TOKEN_HINTS = (
    "-----BEGIN ",
    "AKIA",
    "ASIA",
    *GITHUB_HINTS,
    "glpat-",
    "hf_",
    "sk-",
    "xox",
    *STORE_HINTS,
    "SG.",
    "AIza",
    "eyJ",
)
ISSUERS = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}"
    r"|3[47][0-9]{13}|35[0-9]{14}|3[068][0-9]{12}|6(?:011|2[0-9]{2}|4[4-9][0-9]|5[0-9]{2})[0-9]{12,15}"
)
KINDS: Mapping[str, _Kind] = {
    "keys and access tokens": _Kind(TOKEN_HINTS, re.compile(TOKENS)),
    "e-mail addresses": _Kind(
        ("@",),
        re.compile(
            r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
        ),
        _owned,
    ),
    "resident identity numbers": _Kind(
        (),
        re.compile(
            r"(?<![0-9])[1-9][0-9]{5}(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx]"
            r"(?![0-9A-Za-z])"
        ),
        resident_id,
    ),
    "IBANs": _Kind(
        (),
        re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"),
        iban,
    ),
    "card numbers": _Kind((), re.compile(r"(?<![0-9.])[2-6][0-9]{3}(?:[ -]?[0-9]){9,15}(?![0-9])"), card),
    "phone numbers": _Kind(
        (),
        re.compile(
            r"(?<![\w.)-])(?:(?:\+?86[ -]?)?1[3-9][0-9](?:[0-9]{8}|[ -][0-9]{4}[ -][0-9]{4})"
            r"|0[0-9]{2,3}-[0-9]{7,8}"
            r"|\+[1-9][0-9]{0,3}(?:[ .-]?\(?[0-9]{1,5}\)?){2,5}"
            r"|\(?[0-9]{3}\)?[ .-][0-9]{3}[.-][0-9]{4})(?![0-9]|[.-][0-9])"
        ),
        _international,
    ),
}
