"""Each cleaning rule: exact text before and after."""

import pytest

from corpora.clean import clean
from corpora.settings import Clean


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("plain\ttext\n", "plain\ttext\n", []),
        ("a\r\nb\rc\n", "a\nb\nc\n", ["newlines"]),
        ("a\r\r\nb", "a\n\nb", ["newlines"]),
        ("a\0b\x1b[0mc\x7f", "ab[0mc", ["control characters"]),
        ("a\x0cb\x85c\x9fd", "abcd", ["control characters"]),
        ("\x00\r\n", "\n", ["newlines", "control characters"]),
        ("caf\u00e9 \u2028 \U0001f600 \u00a0", "caf\u00e9 \u2028 \U0001f600 \u00a0", []),
    ],
)
def test_what_a_text_becomes(before: str, after: str, changed: list[str]) -> None:
    cleaned = clean(before, Clean())
    assert (cleaned.text, cleaned.changed) == (after, changed)


@pytest.mark.parametrize(
    ("text", "min_chars", "dropped"),
    [
        ("", 1, "empty"),
        (" \n\t\u00a0", 1, "empty"),
        ("\x00\x01", 1, "empty"),
        ("a", 1, None),
        (" ab ", 3, "too short"),
        (" abc ", 3, None),
    ],
)
def test_what_is_dropped(text: str, min_chars: int, dropped: str | None) -> None:
    assert clean(text, Clean(min_chars=min_chars)).dropped == dropped


def test_a_rule_that_is_off_does_nothing() -> None:
    text = "a\r\n\0b"
    assert clean(text, Clean(control_characters=False, newlines=False)).text == text
