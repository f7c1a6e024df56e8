"""Each cleaning rule: exact text before and after, and what it must leave alone."""

import json
import re
import time
import unicodedata
from typing import get_args

import ftfy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpora.clean import _RULES, SUBSETS, Cleaner
from corpora.errors import InputError
from corpora.settings import Clean, Rule

PROSE, CODE = "Pile-CC", "Github"
CLEANER = Cleaner(Clean())


def changed(text: str, subset: str, cleaner: Cleaner = CLEANER) -> tuple[str, list[str]]:
    cleaned = cleaner(text, subset)
    assert cleaned.data == cleaned.text.encode()
    return cleaned.text, [rule for rule, _, _ in cleaned.changed]


@pytest.mark.parametrize("subset", [PROSE, CODE])
@pytest.mark.parametrize(
    ("before", "after", "rules"),
    [
        ("\ufeffa", "a", ["byte_order_mark"]),
        ("\ufeff\ufeffa\ufeffb", "a\ufeffb", ["byte_order_mark"]),  # in the midst it is a joiner
        ("a\r\nb\rc\n", "a\nb\nc\n", ["newlines"]),
        ("a\r\r\nb", "a\n\nb", ["newlines"]),
        ("page\fpage\vline", "page\npage\nline", ["newlines"]),  # never "pagepageline"
        ("a\0b\x1b[0mc\x7f", "ab[0mc", ["control_characters"]),
        ("a\x08\x0e\x1a\x1fé", "aé", ["control_characters"]),
        ("\x00\r\n", "\n", ["newlines", "control_characters"]),
        ("\r\0\n", "\n\n", ["newlines", "control_characters"]),
        ("\x00\ufeffa", "a", ["control_characters", "byte_order_mark"]),  # found in the second round
    ],
)
def test_what_every_profile_changes(before: str, after: str, rules: list[str], subset: str) -> None:
    assert changed(before, subset) == (after, rules)


@pytest.mark.parametrize(
    ("before", "after", "rules"),
    [
        ("a\u2028b\u2029c", "a\nb\nc", ["line_separators"]),
        ("e\u0301 A\u030a \u212b \u1100\u1161", "é Å Å 가", ["nfc"]),
        ("e\u0323\u0302 e\u0302\u0323", "ệ ệ", ["nfc"]),
        ("It\u00e2\u20ac\u2122s na\u00c3\u00afve", "It’s naïve", ["mojibake"]),  # Windows-1252
        (
            "It\u00e2\x80\x99s \u00e2\x80\x9cfine\u00e2\x80\x9d",
            "It’s “fine”",
            ["mojibake"],
        ),  # Latin-1, with C1
        ("☃ and then itâ€™s", "☃ and then it’s", ["mojibake"]),  # in the midst of what is good
        ("voilÃ le travail", "voilà le travail", ["mojibake"]),  # NBSP became a space
        ("ÃƒÂ©tÃƒÂ©", "été", ["mojibake"]),  # twice
        ("РџСЂРёРІРµС‚", "Привет", ["mojibake"]),  # Windows-1251
        ("\x93quoted\x94 \x96 \x85", "“quoted” – …", ["mojibake"]),  # Windows-1252 read as Latin-1
        ("a\x81\x8d\x9db", "ab", ["control_characters"]),  # C1 that Windows-1252 leaves out
        ("ï»¿text", "text", ["mojibake", "byte_order_mark"]),
        ("Ã\x00©t\x00Ã©", "été", ["mojibake", "control_characters"]),
        ("A\u0303© b", "é b", ["nfc", "mojibake"]),
        ("é\u00e2\x80\xa8x", "é\nx", ["mojibake", "line_separators"]),
        ("a\u00a0b\u00adc", "a\u00a0b\u00adc", []),  # NBSP, soft hyphen
        ("\ufb01 \uff21 \u2460 x²", "\ufb01 \uff21 \u2460 x²", []),  # NFKC would change all of them
        ("NÃO HÁ INFORMAÇÃO, São João à noite", "NÃO HÁ INFORMAÇÃO, São João à noite", []),
        ("if (x == “y”) { return ‘z’; } // £5 — €10…", "if (x == “y”) { return ‘z’; } // £5 — €10…", []),
        (
            "« L’été », dit-il\u00a0: «\u00a0déjà\u00a0» — l’île",
            "« L’été », dit-il\u00a0: «\u00a0déjà\u00a0» — l’île",
            [],
        ),
        ("你好,世界!「はい」カタカナ 안녕하세요", "你好,世界!「はい」カタカナ 안녕하세요", []),
        ("Hôm nay trời đẹp quá, ẤỆỘ", "Hôm nay trời đẹp quá, ẤỆỘ", []),
        ("ВСЁ ещё ёжик — «да»", "ВСЁ ещё ёжик — «да»", []),
        ("ÁÉÍÓÚ ÄÖÜ ŻÓŁĆ ÅÄÖ ÆØÅ", "ÁÉÍÓÚ ÄÖÜ ŻÓŁĆ ÅÄÖ ÆØÅ", []),
        ("สวัสดี नमस्ते שלום مرحبا", "สวัสดี नमस्ते שלום مرحبا", []),
        ("👨\u200d👩\u200d👧 ❤\ufe0f 🇫🇷 👍🏽", "👨\u200d👩\u200d👧 ❤\ufe0f 🇫🇷 👍🏽", []),
        ("∀x ∈ ℝ: √2 ≈ 1.41 ≠ 1.5", "∀x ∈ ℝ: √2 ≈ 1.41 ≠ 1.5", []),
        ("lost: \ufffd\ufffd", "lost: \ufffd\ufffd", []),
    ],
)
def test_what_prose_becomes(before: str, after: str, rules: list[str]) -> None:
    assert changed(before, PROSE) == (after, rules)


@pytest.mark.parametrize(
    ("before", "after", "rules"),
    [
        ("plain\ttext\n  more \n\n\n\n", "plain\ttext\n  more \n\n\n\n", []),
        ('s = "â€™"  # “curly”', 's = "â€™"  # “curly”', []),  # a test of mojibake, say
        ("e\u0301 \u212b", "e\u0301 \u212b", []),  # combining marks stay as they are
        ("a\u2028b\u2029c", "a\u2028b\u2029c", []),
        ("a\x85b\x9fc\x80", "abc", ["control_characters"]),
        ("©\u00a0®", "©\u00a0®", []),  # C2 is the first byte of C1 as well
        ("caf\u00e9 \U0001f600 \u00a0", "caf\u00e9 \U0001f600 \u00a0", []),
    ],
)
def test_what_all_else_becomes(before: str, after: str, rules: list[str]) -> None:
    assert changed(before, CODE) == (after, rules)


def test_bytes_are_counted_from_rule_to_rule() -> None:
    cleaned = CLEANER("\ufeffa\r\nitâ€™s\x00 e\u0301", PROSE)
    assert cleaned.text == "a\nit’s é"
    assert cleaned.changed == (
        ("byte_order_mark", 22, 19),
        ("newlines", 19, 18),
        ("mojibake", 18, 13),
        ("control_characters", 13, 12),
        ("nfc", 12, 11),
    )
    assert len(cleaned.data) == 11


@pytest.mark.parametrize(
    ("text", "min_chars", "dropped"),
    [
        ("", 1, "empty"),
        (" \n\t\u00a0", 1, "empty"),
        ("\x00\x01", 1, "empty"),
        ("\ufeff", 1, "empty"),
        (" ", 5, "empty"),
        ("a", 1, None),
        (" ab ", 3, "too short"),
        ("é\0\0", 2, "too short"),
        (" abc ", 3, None),
    ],
)
@pytest.mark.parametrize("subset", [PROSE, CODE])
def test_what_is_dropped(text: str, min_chars: int, dropped: str | None, subset: str) -> None:
    assert Cleaner(Clean(min_chars=min_chars))(text, subset).dropped == dropped


# One sentence of each script and of each half of Latin.
SENTENCES = (
    "L’été dernier, nous avons mangé à Orléans — c’était « délicieux ». Où ça ? Là-bas, cœur naïf.",
    "Über die Brücke zur Straße: „Schöne Grüße“, ÄÖÜ weiß.",
    "¿Dónde está el niño? ¡Mañana comeremos jamón y piña! ÁÉÍÓÚ Ñ",
    "NÃO HÁ INFORMAÇÃO. A nação não é só coração; três avós, pães e limões.",
    "Zażółć gęślą jaźń. Łódź, Kraków — „dobrze”. ŻÓŁĆ",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Čeština.",
    "Árvíztűrő tükörfúrógép. Őszi idő, Űrhajó.",
    "İstanbul’da güneşli bir gün; çocuklar şeker yiyor. IĞDIR, ılık.",
    "Ąžuolas žydi, ėjimas, įstaiga. Rīgā ir skaisti, ķēniņš, ļoti.",
    "Καλημέρα κόσμε. Ελληνικά γράμματα, «ναι». Άνθρωπος.",
    "Привет, мир! Ещё раз: ёжик в тумане — «да». ВСЁ",
    "שלום עולם, מה שלומך היום? ירושלים.",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "नमस्ते दुनिया, आप कैसे हैं? हिन्दी भाषा।",
    "สวัสดีชาวโลก วันนี้เป็นอย่างไรบ้าง",
    "გამარჯობა მსოფლიო, როგორ ხარ?",
    "你好,世界!今天天气很好。こんにちは。「はい」カタカナ",
    "안녕하세요 세계. 오늘 날씨가 좋네요.",
    "Xin chào thế giới. Hôm nay trời đẹp quá! Đường phố ẤỆỘ.",
    "“It’s fine,” she said — 20 °C… £5, €10, ½ cup, ©2020 ®, Brand™ • item",
    "Hello 😀 👍🏽 ❤️ great ✅",
)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_stays_and_is_mended_when_it_was_garbled(sentence: str) -> None:
    sentence = unicodedata.normalize("NFC", sentence)
    assert changed(sentence, PROSE) == (sentence, [])
    assert changed(sentence, CODE) == (sentence, [])
    garbled = sentence.encode().decode("latin-1")
    assert changed(garbled, PROSE) == (sentence, ["mojibake"])
    assert changed(garbled, CODE)[1] == ["control_characters"]


def test_the_look_in_front_of_ftfy_misses_next_to_nothing() -> None:
    only = Cleaner(Clean(profiles={"only": ("mojibake",)}, subsets={"x": "only"}))
    mended, missed = 0, set()
    for encoding in (
        "latin-1",
        *(f"sloppy-windows-125{n}" for n in "0123478"),
        "iso-8859-2",
        "macroman",
        "cp437",
    ):
        for sentence in SENTENCES:
            for text in (sentence, *sentence.split()):
                garbled = text.encode().decode(encoding, "replace")
                lost = re.sub("[\x80-\x9f]", "\ufffd", garbled)
                for form in (garbled, garbled.replace("\xa0", " "), lost, f"☃ {garbled}", f"good, {garbled}"):
                    by_ftfy = ftfy.fix_encoding(form)
                    if by_ftfy != form:
                        mended += 1
                        if changed(form, "x", only)[0] != by_ftfy:
                            missed.add(form)
    assert mended > 5000
    assert missed == set()


def test_what_takes_very_long_is_left_alone() -> None:
    start = time.perf_counter()
    marks = "a" + "\u0301\u0323" * 200_000
    assert changed(marks, PROSE) == (marks, [])  # two minutes in unicodedata.normalize
    assert changed(" " + marks, PROSE) == (" " + marks, [])
    some = "a" + "\u0301\u0323" * 400  # a row of 800 is sorted
    assert changed(some, PROSE) == (unicodedata.normalize("NFC", some), ["nfc"])
    long = "Ã©" * (1 << 21) + "!"
    assert changed(long, PROSE) == (long, [])
    assert changed(long[:999_998], PROSE) == ("é" * 499_999, ["mojibake"])
    assert time.perf_counter() - start < 10


def test_every_rule_of_the_settings_is_there() -> None:
    assert set(_RULES) == set(get_args(Rule))


def test_the_pile_has_22_subsets_and_each_a_profile() -> None:
    safe = {name for name, profile in SUBSETS.items() if profile == "safe"}
    assert safe == {
        *(
            "ArXiv",
            "DM Mathematics",
            "Enron Emails",
            "Github",
            "PubMed Central",
            "StackExchange",
            "Ubuntu IRC",
        )
    }
    assert {name for name, profile in SUBSETS.items() if profile == "prose"} == {
        *("BookCorpus2", "Books3", "EuroParl", "FreeLaw", "Gutenberg (PG-19)", "HackerNews", "NIH ExPorter"),
        *("OpenSubtitles", "OpenWebText2", "PhilPapers", "Pile-CC", "PubMed Abstracts", "USPTO Backgrounds"),
        *("Wikipedia (en)", "YoutubeSubtitles"),
    }


def test_a_recipe_adds_profiles_and_overrides_the_table() -> None:
    cleaner = Cleaner(
        Clean(
            profiles={"mine": ("nfc", "newlines"), "safe": ()},
            subsets={"Github": "mine", "my notes": "prose"},
        )
    )
    names = ("Github", "my notes", "ArXiv", "UPSTO Backgrounds", "Pile-CC")
    assert [(cleaner.profile(name), cleaner.known(name)) for name in names] == [
        ("mine", True),
        ("prose", True),
        ("safe", True),
        ("safe", False),
        ("prose", True),
    ]
    assert changed("\0e\u0301\r", "Github", cleaner) == ("\0é\n", ["newlines", "nfc"])
    assert changed("\0e\u0301\r", "never heard of", cleaner) == ("\0e\u0301\r", [])
    assert changed("\0e\u0301\r", "my notes", cleaner) == ("é\n", ["newlines", "control_characters", "nfc"])


def test_without_mojibake_a_next_line_is_a_newline() -> None:
    cleaner = Cleaner(Clean(profiles={"prose": ("control_characters", "line_separators")}))
    assert changed("a\x85b\x80", PROSE, cleaner) == ("a\nb", ["line_separators", "control_characters"])


def test_a_subset_with_an_unknown_profile_is_refused() -> None:
    with pytest.raises(InputError) as error:
        Cleaner(Clean(profiles={"mine": ()}, subsets={"Github": "cod"}))
    assert str(error.value) == "[clean.subsets] 'Github': unknown profile 'cod' (known: mine, prose, safe)"


def test_what_decides_the_result() -> None:
    rules = Clean(subsets={"notes": "prose"}, min_chars=5, duplicates="drop", quarantine_limit=0.5)
    made = Cleaner(rules).made()
    assert made == {
        "profiles": {
            "prose": [
                *("byte_order_mark/1", "newlines/2", "mojibake/1"),
                *("line_separators/1", "control_characters/1", "nfc/1"),
            ],
            "safe": ["byte_order_mark/1", "newlines/2", "control_characters/1"],
        },
        "subsets": {**SUBSETS, "notes": "prose"},
        "min_chars": 5,
        "duplicates": "drop",
        "ftfy": "6.3.1",
        "unicode": unicodedata.unidata_version,
    }
    assert json.loads(json.dumps(made)) == made


def test_libraries_decide_only_where_they_are_used() -> None:
    made = Cleaner(Clean(profiles={"prose": ("nfc", "newlines"), "code": ()})).made()
    assert made["profiles"] == {
        "prose": ["newlines/2", "nfc/1"],
        "safe": ["byte_order_mark/1", "newlines/2", "control_characters/1"],
        "code": [],
    }
    assert "unicode" in made and "ftfy" not in made
    assert "unicode" not in Cleaner(Clean(profiles={"prose": ("mojibake",)})).made()


# What rules look for, and what they make of each other: garbled bytes of each encoding, marks, ends of lines.
NASTY = "aA ?.\t\n\r\f\v\0\x1a\x1b\x7f\x80\x85\x93\x9d\u2028\u2029\ufeff\ufffd\u0301\u0303\u0323\u0338\u1100\u1161\u212b"
PIECES = [
    "â€™",
    "Ã©",
    "ï»¿",
    "Ð¿",
    "Г©",
    "├⌐",
    "√©",
    "Â\x85",
    "À\x80",
    "í\xa0½í¸\x80",
    "ÃƒÂ©",
    "’",
    "é",
    "Å",
    "中",
    "😀",
]
GARBLED = "".join(
    bytes(range(0x80, 0x100)).decode(name, "ignore") for name in ("latin-1", "cp1252", "cp1251", "cp437")
)
TEXTS = st.one_of(
    st.lists(st.sampled_from([*NASTY, *PIECES]), max_size=12).map("".join),
    st.text(alphabet=st.sampled_from(GARBLED + NASTY), max_size=12),
    st.text(max_size=12),
)


@settings(max_examples=1500, deadline=None)
@given(TEXTS)
@example("A\u0303© \0Ã\0©")
@example("\u0301\u00c3\u0303\u00a9\ufeff")
def test_cleaning_a_clean_text_changes_nothing_and_bytes_add_up(text: str) -> None:
    for subset, marks in ((PROSE, "\u2028\u2029"), (CODE, "")):
        cleaned = CLEANER(text, subset)
        again = CLEANER(cleaned.text, subset)
        assert (again.text, again.changed, again.dropped) == (cleaned.text, (), cleaned.dropped)
        assert cleaned.data == cleaned.text.encode()
        assert not set(cleaned.text) & {*map(chr, range(9)), *map(chr, range(11, 32)), *marks}
        assert not set(cleaned.text) & set(map(chr, range(0x7F, 0xA0)))
        assert not cleaned.text.startswith("\ufeff")
        size = len(text.encode())
        for _, before, after in cleaned.changed:
            assert before == size
            size = after
        assert size == len(cleaned.data)
        rules = [rule for rule, _, _ in cleaned.changed]
        assert len(rules) == len(set(rules))
        assert (cleaned.text != text) <= bool(rules)
        assert (cleaned.dropped == "empty") == (not cleaned.text.strip())
    assert unicodedata.is_normalized("NFC", CLEANER(text, PROSE).text)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from(get_args(Rule)))
def test_each_rule_alone_is_done_once(text: str, rule: Rule) -> None:
    only = Cleaner(Clean(profiles={"only": (rule,)}, subsets={"x": "only"}))
    once = only(text, "x")
    assert only(once.text, "x").changed == ()
    step = _RULES[rule][1]
    assert step(once.text, once.data) == once.text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("".join(map(chr, range(0x20, 0x7F))) + "\t\n")))
def test_printable_ascii_is_never_touched(text: str) -> None:
    for subset in (PROSE, CODE, "never heard of"):
        assert changed(text, subset) == (text, [])
