"""A dry run of cleaning: what the rules do to the first documents of a shard, with examples to judge them by."""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from corpora.clean import Cleaner
from corpora.fetch import verified
from corpora.formats import Shard
from corpora.read import BadRecord, Line, parse_record
from corpora.settings import DataSettings

_BOM = b"\xef\xbb\xbf"
_BEFORE, _WIDTH = 20, 60  # characters of an example before the first difference, and of all of it


@dataclass
class _Met:
    """What a rule met."""

    documents: int = 0
    examples: list[tuple[str, ...]] = field(default_factory=list)


@dataclass
class _Subset:
    documents: int = 0
    before: int = 0  # bytes of text as it came
    after: int = 0  # bytes of text kept


class _Sample:
    """Counts and examples, line by line."""

    def __init__(self, settings: DataSettings, shard: str, examples: int) -> None:
        self.corpus, self.shard, self.examples = settings.corpus, shard, examples
        self.cleaner = Cleaner(settings.clean)
        self.lines = self.kept = 0
        self.subsets: defaultdict[str, _Subset] = defaultdict(_Subset)
        self.changed: defaultdict[str, _Met] = defaultdict(_Met)
        self.dropped: defaultdict[str, _Met] = defaultdict(_Met)
        self.quarantined: defaultdict[str, _Met] = defaultdict(_Met)

    def take(self, line: Line) -> None:
        """Read and clean a line as the parts of a shard are (corpora.make_part), and count what happens to it."""
        self.lines += 1
        where = f"{self.shard}:{line.number}"
        content = line.data or b""
        if line.number == 1 and content.startswith(_BOM):
            content = content.removeprefix(_BOM)
            self._meet(self.changed["byte_order_mark"], f"{where}, before its JSON")
        try:
            if line.data is None:
                raise BadRecord("line too long")
            if not content.strip():
                self._meet(self.dropped["blank_line"], where)
                return
            record = parse_record(content, self.corpus)
        except BadRecord as error:
            begins = f"begins {content[:_WIDTH]!r}" if content else f"{line.size:,} bytes"
            self._meet(self.quarantined[str(error)], where, begins)
            return
        where += f", {record.subset}"
        text, data = record.text, record.text.encode()
        subset = self.subsets[record.subset]
        subset.documents += 1
        subset.before += len(data)
        if record.repaired:
            raw = json.loads(content)[self.corpus.text_field]
            self._meet(self.changed["lone_surrogates"], where, *_difference(raw, text))
        met = set()
        for rule, new, _ in self.cleaner.changes(text, data, record.subset):
            if rule not in met:  # it may come again
                self._meet(self.changed[rule], where, *_difference(text, new))
            met.add(rule)
            text = new
        cleaned = self.cleaner(record.text, record.subset)
        if cleaned.dropped is not None:
            self._meet(self.dropped[cleaned.dropped], where, f"text {record.text[:_WIDTH]!r}")
            return
        self.kept += 1
        subset.after += len(cleaned.data)

    def _meet(self, met: _Met, *example: str) -> None:
        met.documents += 1
        if len(met.examples) < self.examples:
            met.examples.append(example)

    def report(self) -> Iterator[str]:
        """Yield the lines to print."""
        dropped, quarantined = (
            sum(met.documents for met in kind.values()) for kind in (self.dropped, self.quarantined)
        )
        yield (
            f"shard {self.shard}: {self.lines:,} lines read = {self.kept:,} kept + {dropped:,} dropped"
            f" + {quarantined:,} to be quarantined (duplicates and the tokenizer are not looked at)"
        )
        yield ""
        yield f"{'subset':<28} {'profile':<20} {'documents':>9} {'bytes before':>14} {'bytes kept':>14}"
        for name, subset in sorted(self.subsets.items(), key=lambda item: (-item[1].before, item[0])):
            profile = self.cleaner.profile(name) + ("" if self.cleaner.known(name) else " (unknown)")
            yield f"{name:<28} {profile:<20} {subset.documents:>9,} {subset.before:>14,} {subset.after:>14,}"
        kinds = (("", self.changed), ("dropped: ", self.dropped), ("quarantined: ", self.quarantined))
        for kind, rules in kinds:
            for rule, met in sorted(rules.items(), key=lambda item: (-item[1].documents, item[0])):
                yield ""
                yield f"{kind}{rule}: {met.documents:,} {'document' if met.documents == 1 else 'documents'}"
                for where, *shown in met.examples:
                    yield f"  {where}"
                    yield from (f"    {line}" for line in shown)


def sample(
    settings: DataSettings, shard: str, data: Path, documents: int, examples: int = 3
) -> Iterator[str]:
    """Clean the first `documents` records of a fetched shard, write nothing, and yield lines to print.

    They show what each rule did, with up to `examples` places where it did.  Raises InputError for a shard that is
    not fetched, damaged or of another format than its name says.
    """
    path = data / verified(settings.corpus, shard, data).path
    seen = _Sample(settings, shard, examples)
    with Shard(path, settings.corpus) as opened:
        for line in islice(opened.lines, documents):
            seen.take(line)
    yield from seen.report()


def _difference(before: str, after: str) -> tuple[str, str]:
    """Show two texts around their first difference, escaped so that it can be seen.

    Where both would look the same, as a letter with its mark in one or in two characters, all but ASCII is escaped.
    """
    pairs = enumerate(zip(before, after, strict=False))
    first = next((index for index, (old, new) in pairs if old != new), min(len(before), len(after)))
    start = max(0, first - _BEFORE)
    old, new = (text[start : start + _WIDTH] for text in (before, after))
    alike = unicodedata.normalize("NFC", old) == unicodedata.normalize("NFC", new)
    show = ascii if alike else repr
    return f"before {show(old)}", f"after  {show(new)}"
