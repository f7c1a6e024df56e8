"""The dry run: every line of what it prints for a small shard."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from corpora.clean import Cleaner
from corpora.errors import InputError
from corpora.make_part import read_document
from corpora.read import BadRecord, Line
from corpora.sample import sample
from corpora.settings import DataSettings

Tiny = Callable[..., tuple[DataSettings, Path]]


def document(text: str, subset: str = "Github") -> bytes:
    return json.dumps({"text": text, "meta": {"pile_set_name": subset}}).encode()


LINES = [
    b"\xef\xbb\xbf" + document("print(1)\r\n"),
    document("a page\x0canother\r\n", "Pile-CC"),
    document("x" * 30 + " and then it\u00e2\u20ac\u2122s over, " + "y" * 30, "Pile-CC"),
    document("cafe\u0301", "Wikipedia (en)"),
    document("bell\x07 ok!", "my notes"),
    b"",
    b'{"text": "half \\ud83d of it", "meta": {"pile_set_name": "Github"}}',
    document(" \x00 "),
    document("ab", "Pile-CC"),
    b"{broken",
    b'{"text": "\xff"}',
    document("z" * 2000),
    document("untouched\n", "Github"),
    b"{broken, too",
]

REPORT = r"""
shard a: 14 lines read = 7 kept + 3 dropped + 4 to be quarantined (duplicates and the tokenizer are not looked at)

subset                       profile              documents   bytes before     bytes kept
Pile-CC                      prose                        3            106             98
Github                       safe                         4             37             33
my notes                     safe (unknown)               1              9              8
Wikipedia (en)               prose                        1              6              5

control_characters: 2 documents
  a:5, my notes
    before 'bell\x07 ok!'
    after  'bell ok!'
  a:8, Github
    before ' \x00 '
    after  '  '

newlines: 2 documents
  a:1, Github
    before 'print(1)\r\n'
    after  'print(1)\n'
  a:2, Pile-CC
    before 'a page\x0canother\r\n'
    after  'a page\nanother\n'

byte_order_mark: 1 document
  a:1, before its JSON

lone_surrogates: 1 document
  a:7, Github
    before 'half \ud83d of it'
    after  'half � of it'

mojibake: 1 document
  a:3, Pile-CC
    before 'xxxxxxxx and then itâ€™s over, yyyyyyyyyyyyyyyyyyyyyyyyyyyyy'
    after  'xxxxxxxx and then it’s over, yyyyyyyyyyyyyyyyyyyyyyyyyyyyyy'

nfc: 1 document
  a:4, Wikipedia (en)
    before 'cafe\u0301'
    after  'caf\xe9'

dropped: blank_line: 1 document
  a:6

dropped: empty: 1 document
  a:8, Github
    text ' \x00 '

dropped: too short: 1 document
  a:9, Pile-CC
    text 'ab'

quarantined: invalid JSON: 2 documents
  a:10
    begins b'{broken'
  a:14
    begins b'{broken, too'

quarantined: invalid UTF-8: 1 document
  a:11
    begins b'{"text": "\xff"}'

quarantined: line too long: 1 document
  a:12
    2,049 bytes
"""


@pytest.fixture
def shard(tiny: Tiny) -> tuple[DataSettings, Path]:
    return tiny(b"\n".join(LINES), clean={"min_chars": 3}, corpus={"max_record_bytes": 1024})


def test_the_report_of_a_small_shard(shard: tuple[DataSettings, Path]) -> None:
    settings, data = shard
    before = sorted(data.rglob("*"))
    assert list(sample(settings, "a", data, 100)) == REPORT.strip("\n").split("\n")
    assert sorted(data.rglob("*")) == before


def test_it_says_what_the_real_run_does(shard: tuple[DataSettings, Path]) -> None:
    """Both read a line by code of their own; here they agree."""
    settings, data = shard
    cleaner = Cleaner(settings.clean)
    kept = dropped = quarantined = 0
    for number, line in enumerate(LINES, 1):
        try:
            read = read_document(
                Line(number, 0, len(line), line if len(line) <= 1024 else None), settings.corpus, cleaner
            )
        except BadRecord:
            quarantined += 1
        else:
            gone = read is None or read.cleaned.dropped is not None
            dropped, kept = dropped + gone, kept + (not gone)
    first = next(sample(settings, "a", data, 100))
    assert first.startswith(
        f"shard a: 14 lines read = {kept} kept + {dropped} dropped + {quarantined} to be quarantined"
    )


def test_only_the_first_documents_and_so_many_examples(shard: tuple[DataSettings, Path]) -> None:
    settings, data = shard
    lines = list(sample(settings, "a", data, 2, examples=1))
    assert lines[0].startswith("shard a: 2 lines read = 2 kept + 0 dropped + 0 to be quarantined")
    at = lines.index("newlines: 2 documents")
    assert lines[at + 1 : at + 4] == [
        "  a:1, Github",
        r"    before 'print(1)\r\n'",
        r"    after  'print(1)\n'",
    ]
    assert not any("a:2" in line for line in lines)
    none = list(sample(settings, "a", data, 2, examples=0))
    assert "newlines: 2 documents" in none and not any("before '" in line for line in none)


def test_an_example_is_the_place_of_the_first_difference(tiny: Tiny) -> None:
    text = "".join(f"line {n:04}\n" for n in range(1000)) + "here\x00 it is" + "\nand on" * 1000
    settings, data = tiny(document(text))
    lines = list(sample(settings, "a", data, 1))
    at = lines.index("  a:1, Github")
    assert lines[at + 1 :] == [
        r"    before ' 0998\nline 0999\nhere\x00 it is\nand on\nand on\nand on\nand on\nand '",
        r"    after  ' 0998\nline 0999\nhere it is\nand on\nand on\nand on\nand on\nand o'",
    ]


def test_an_example_shows_one_rule_and_a_rule_that_comes_again_is_one_document(tiny: Tiny) -> None:
    settings, data = tiny(document("itâ€™s Ã\x00©", "Pile-CC"))
    lines = list(sample(settings, "a", data, 1))
    assert lines[4:] == [
        *("", "control_characters: 1 document", "  a:1, Pile-CC"),
        *(r"    before 'it’s Ã\x00©'", "    after  'it’s Ã©'"),
        *("", "mojibake: 1 document", "  a:1, Pile-CC"),
        *(r"    before 'itâ€™s Ã\x00©'", r"    after  'it’s Ã\x00©'"),
    ]


def test_a_shard_that_is_not_fetched_is_refused(shard: tuple[DataSettings, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shard a is not there; run `python -m corpora fetch RECIPE`"):
        list(sample(shard[0], "a", tmp_path / "elsewhere", 10))
