"""What is done to a document's text: named rules, chosen by the profile of its subset.

Most documents pass untouched, so they must pass fast.  The text is encoded once, tab, LF and printable ASCII are
taken out of its bytes, and the rules look at what is left, which is little or nothing, before they do any work.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ftfy

from corpora.errors import InputError
from corpora.settings import Clean, Rule

SAFE: tuple[Rule, ...] = ("byte_order_mark", "newlines", "control_characters")
PROSE: tuple[Rule, ...] = (*SAFE, "mojibake", "line_separators", "nfc")
SUBSETS = {  # of the Pile: what a person wrote to be read is prose; code, markup, mathematics, chat, mail are not
    "ArXiv": "safe",
    "BookCorpus2": "prose",
    "Books3": "prose",
    "DM Mathematics": "safe",
    "Enron Emails": "safe",
    "EuroParl": "prose",
    "FreeLaw": "prose",
    "Github": "safe",
    "Gutenberg (PG-19)": "prose",
    "HackerNews": "prose",
    "NIH ExPorter": "prose",
    "OpenSubtitles": "prose",
    "OpenWebText2": "prose",
    "PhilPapers": "prose",
    "Pile-CC": "prose",
    "PubMed Abstracts": "prose",
    "PubMed Central": "safe",  # LaTeX in it
    "StackExchange": "safe",
    "USPTO Backgrounds": "prose",
    "Ubuntu IRC": "safe",
    "Wikipedia (en)": "prose",
    "YoutubeSubtitles": "prose",
}

_PLAIN = bytes([0x09, 0x0A, *range(0x20, 0x7F)])
_C0 = bytes([*range(0x09), *range(0x0B, 0x20), 0x7F])  # without tab and LF, and with DEL
_C1 = re.compile(b"\xc2[\x80-\x9f]")  # in UTF-8
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LONG = 1 << 22  # characters
_MARKS = 1000
_TO_SPACE = bytes([*b" " * 0x80, *range(0x80, 0x100)])


def _garbled() -> re.Pattern[str]:
    """Compile what UTF-8 looks like, at the least, when it was read as one of the encodings that ftfy tries.

    That is the character of a first byte and those of one or two bytes that continue it.  The two classes in front
    add nothing but speed: they are true of any of the encodings, and `re` runs through a text for one class.
    """

    def characters(encodings: str, first: int, last: int) -> str:
        """Return what these bytes are in any of the encodings; a byte that one leaves out is as in Latin-1."""
        each = (
            bytes([byte]).decode(encoding, "ignore") or chr(byte)
            for encoding in encodings.split()
            for byte in range(first, last + 1)
        )
        return "".join(sorted(set(each) - {"\\"}))

    # Mac Roman has quotes, dashes and NBSP among its first bytes; of these only the dashes of Cyrillic are taken.
    starts = "".join(set(characters("mac-roman", 0xC2, 0xF4)) - set("“”‘’–—…«»\xa0"))
    ends = characters("mac-roman", 0x80, 0xBF)
    ways = [f"(?<=[{starts}])[{ends}]", f"(?<=[–—])[{ends}][–—]"]
    all_starts, all_ends = starts + "–—", ends
    for family in ("latin-1 cp1252 cp1250 cp1254 cp1257 iso8859-2", "cp1251", "cp1253", "cp437"):
        two, more = characters(family, 0xC2, 0xDF), characters(family, 0xE0, 0xF4)
        ends = characters(family, 0x80, 0xBF) + "\ufffd"
        ways += [f"(?<=[{two}])[{ends}]", f"(?<=[{more}])[{ends}]{{2}}"]
        all_starts, all_ends = all_starts + two + more, all_ends + ends
    return re.compile(f"[{all_starts}](?=[{all_ends}])(?:{'|'.join(ways)})")


_GARBLED = _garbled()


def _byte_order_mark(text: str, odd: bytes) -> str:
    return text.lstrip("\ufeff") if b"\xef\xbb\xbf" in odd else text


def _newlines(text: str, odd: bytes) -> str:
    """Make CRLF and CR an LF, and form feed and vertical tab too: without them words would be glued."""
    if b"\r" in odd:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if b"\f" in odd or b"\v" in odd:
        text = text.replace("\f", "\n").replace("\v", "\n")
    return text


def _mojibake(text: str, odd: bytes) -> str:
    """Mend UTF-8 that was read as another encoding, and C1 characters, which are Windows-1252 read as Latin-1.

    ftfy looks at 6 MB/s, so it is asked only about a text that has the look of it, and of some length at most, as
    its time for Java's and CESU's UTF-8 grows with the square.  Not caught: a first byte whose fellows were lost
    or became spaces, but for "Ã " and "Â "; what Mac Roman makes of bytes C7 to D5, but for Cyrillic, as quotes
    and dashes stand before letters in good text, too; and what ftfy itself lets alone, as it could be meant.
    """
    if len(text) > _LONG:
        return text
    sure = (
        _C1.search(odd) is not None
        or (b"\xc3\x82" in odd and "Â " in text)
        or (b"\xc3\x83" in odd and "Ã " in text)
    )
    if not sure and not _GARBLED.search(odd.decode()):
        return text
    # Letters that are far from one another stand side by side in `odd`; in `runs` they do not.
    runs = b" ".join(text.encode().translate(_TO_SPACE).split())
    return ftfy.fix_encoding(text) if sure or _GARBLED.search(runs.decode()) else text


def _line_separators(text: str, odd: bytes) -> str:
    if b"\xe2\x80\xa8" in odd or b"\xe2\x80\xa9" in odd or b"\xc2\x85" in odd:
        text = text.replace("\u2028", "\n").replace("\u2029", "\n").replace("\x85", "\n")
    return text


def _control_characters(text: str, odd: bytes) -> str:
    if len(odd.translate(None, _C0)) < len(odd) or _C1.search(odd):
        text = _CONTROL.sub("", text)
    return text


def _nfc(text: str, odd: bytes) -> str:
    """Compose letters and their marks, but for a text in which thousands of marks stand in a row.

    To sort those takes time that grows with the square: minutes for 400,000.  A row of them cannot pass between
    the characters that are looked at first.
    """
    if any(map(unicodedata.combining, text[::_MARKS])):
        rows = itertools.groupby(map(unicodedata.combining, text), bool)
        if any(marks and sum(1 for _ in row) > _MARKS for marks, row in rows):
            return text
    return unicodedata.normalize("NFC", text)  # looks first whether there is anything to do


# In the order of application, each with its version: raise it with any change that alters a rule's result.
# Mojibake comes before the two that would take the C1 characters which it is partly made of.
_RULES: dict[Rule, tuple[int, Callable[[str, bytes], str]]] = {
    "byte_order_mark": (1, _byte_order_mark),
    "newlines": (2, _newlines),
    "mojibake": (1, _mojibake),
    "line_separators": (1, _line_separators),
    "control_characters": (1, _control_characters),
    "nfc": (1, _nfc),
}


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A text after cleaning; `dropped` names the rule that drops it."""

    text: str
    data: bytes  # the text in UTF-8
    changed: tuple[tuple[str, int, int], ...]  # rule, UTF-8 bytes before and after; only of rules that did
    dropped: str | None  # "empty" or "too short"


class Cleaner:
    """The rules of a recipe: what they are for each subset, and what they make of a text."""

    def __init__(self, rules: Clean) -> None:
        """Choose the rules.  Raises InputError for a subset that names an unknown profile."""
        self.rules = rules
        profiles: dict[str, tuple[Rule, ...]] = {"prose": PROSE, "safe": SAFE, **rules.profiles}
        self.subsets = {**SUBSETS, **rules.subsets}
        for subset, profile in rules.subsets.items():
            if profile not in profiles:
                raise InputError(
                    f"[clean.subsets] {subset!r}: unknown profile {profile!r} (known: {', '.join(sorted(profiles))})"
                )
        self.profiles = {
            name: tuple(rule for rule in _RULES if rule in set(profiles[name])) for name in profiles
        }
        self._steps = {
            profile: tuple((name, _RULES[name][1]) for name in names)
            for profile, names in self.profiles.items()
        }

    def profile(self, subset: str) -> str:
        """Return the name of a subset's profile."""
        return self.subsets.get(subset, "safe")

    def known(self, subset: str) -> bool:
        """Tell whether a subset has a profile of its own, in the recipe or among the Pile's."""
        return subset in self.subsets

    def made(self) -> dict[str, Any]:
        """Return what decides the result of cleaning, as plain JSON."""
        used = {rule for names in self.profiles.values() for rule in names}
        return {
            "profiles": {
                profile: [f"{name}/{_RULES[name][0]}" for name in names]
                for profile, names in self.profiles.items()
            },
            "subsets": self.subsets,
            "min_chars": self.rules.min_chars,
            "duplicates": self.rules.duplicates,
            **({"ftfy": ftfy.__version__} if "mojibake" in used else {}),
            **({"unicode": unicodedata.unidata_version} if "nfc" in used else {}),
        }

    def __call__(self, text: str, subset: str) -> Cleaned:
        """Clean a text by its subset's rules.

        A rule that comes again is counted to its first time, so that `changed` names each only once.
        """
        data = text.encode()
        size, gains = len(data), dict[str, int]()
        for rule, new, new_data in self.changes(text, data, subset):
            gains[rule] = gains.get(rule, 0) + len(new_data) - len(data)
            text, data = new, new_data
        changed = []
        for rule, gain in gains.items():
            changed.append((rule, size, size + gain))
            size += gain
        length = len(text.strip())
        dropped = None if length >= self.rules.min_chars else "too short" if length else "empty"
        return Cleaned(text, data, tuple(changed), dropped)

    def changes(self, text: str, data: bytes, subset: str) -> Iterator[tuple[str, str, bytes]]:
        """Yield each rule that changes a text, and the text after it, in UTF-8 too; until none does any more.

        Nearly always one round is enough.  But a rule may make work for one before it: it takes a control
        character out of the midst of mojibake, or mends a garbled byte order mark.  That has an end, as each
        takes away what no other puts back.
        """
        odd = data.translate(None, _PLAIN)
        while odd:
            before = text
            for name, rule in self._steps[self.profile(subset)]:
                new = rule(text, odd)
                if new is not text and new != text:
                    text, data = new, new.encode()
                    odd = data.translate(None, _PLAIN)
                    yield name, text, data
            if text is before:
                return
