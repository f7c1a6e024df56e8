"""The exact account of a shard: where every line, every byte of text and every token went."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from corpora.errors import PilelineError

Changes = tuple[tuple[str, int, int], ...]  # rule, UTF-8 bytes of the text before and after


@dataclass(slots=True)
class Subset:
    """Counts of one subset; bytes are those of the text in UTF-8."""

    profile: str  # of cleaning rules
    known: bool  # False: in no table of subsets, so the profile is the safe one
    read: int = 0  # documents
    bytes_read: int = 0
    documents: int = 0  # kept
    bytes: int = 0
    tokens: int = 0
    duplicates: int = 0
    rules: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # documents changed, bytes before and after
    dropped: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # by rule: documents, bytes after cleaning
    quarantined: dict[str, dict[str, int]] = field(default_factory=dict)  # by reason: the same

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass
class Ledger:
    """Counts of one part, or of one shard.  Its laws hold, or the step fails:

    lines = kept + dropped + quarantined
    bytes read + what rules added or took = bytes kept + bytes dropped + bytes quarantined, in each subset
    text tokens + special tokens = blocks x length - padding
    """

    length: int
    lines: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # rule -> documents
    quarantined: Counter[str] = field(default_factory=Counter)  # reason -> lines
    cleaned: Counter[str] = field(default_factory=Counter)  # rule -> documents changed, kept or dropped later
    duplicates: int = 0  # documents equal to an earlier one of their part
    text_tokens: int = 0
    special_tokens: int = 0
    blocks: int = 0
    padding: int = 0
    subsets: dict[str, Subset] = field(default_factory=dict)

    def read(self, subset: Subset, size: int, changes: Changes) -> None:
        """Count one document as it came, and what the rules did to its `size` bytes of text."""
        subset.read += 1
        subset.bytes_read += size
        for rule, before, after in changes:
            self.cleaned[rule] += 1
            counts = subset.rules.setdefault(rule, {"documents": 0, "before": 0, "after": 0})
            counts["documents"] += 1
            counts["before"] += before
            counts["after"] += after

    def keep(self, subset: Subset, size: int, text_tokens: int, special_tokens: int) -> None:
        """Count one document that goes into the blocks, of `size` bytes of cleaned text."""
        self.kept += 1
        self.text_tokens += text_tokens
        self.special_tokens += special_tokens
        subset.documents += 1
        subset.bytes += size
        subset.tokens += text_tokens

    def drop(self, subset: Subset, size: int, rule: str) -> None:
        """Count one document that a rule drops, of `size` bytes of cleaned text."""
        self.dropped[rule] += 1
        _add(subset.dropped, rule, size)

    def quarantine(self, subset: Subset | None, size: int, reason: str) -> None:
        """Count one line that is no document, or whose document (of `size` bytes) cannot be encoded."""
        self.quarantined[reason] += 1
        if subset is not None:
            _add(subset.quarantined, reason, size)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        plain = dict(vars(self))
        for name in ("dropped", "quarantined", "cleaned"):
            plain[name] = dict(plain[name])
        plain["subsets"] = {name: subset.as_dict() for name, subset in self.subsets.items()}
        return plain


def _add(counts: dict[str, dict[str, int]], name: str, size: int) -> None:
    one = counts.setdefault(name, {"documents": 0, "bytes": 0})
    one["documents"] += 1
    one["bytes"] += size


def broken_laws(ledger: dict[str, Any]) -> list[str]:
    """Return the laws that a ledger (as in a manifest) breaks, each with its figures."""
    dropped, quarantined = sum(ledger["dropped"].values()), sum(ledger["quarantined"].values())
    tokens = ledger["text_tokens"] + ledger["special_tokens"]
    room = ledger["blocks"] * ledger["length"]
    broken = []
    if ledger["lines"] != ledger["kept"] + dropped + quarantined:
        broken.append(
            f"{ledger['lines']} lines read, but {ledger['kept']} kept + {dropped} dropped + {quarantined} quarantined"
        )
    if tokens != room - ledger["padding"]:
        broken.append(f"{tokens} tokens, but {room} in blocks - {ledger['padding']} padding")
    for key, whole in (("documents", "kept"), ("tokens", "text_tokens"), ("duplicates", "duplicates")):
        parts = sum(counts[key] for counts in ledger["subsets"].values())
        if parts != ledger[whole]:
            broken.append(f"{ledger[whole]} {whole}, but {parts} {key} in the subsets")
    for name, counts in ledger["subsets"].items():
        gone = [*counts["dropped"].values(), *counts["quarantined"].values()]
        documents = counts["documents"] + sum(one["documents"] for one in gone)
        if counts["read"] != documents:
            broken.append(
                f"{name}: {counts['read']} documents read, but {documents} kept, dropped or quarantined"
            )
        changed = sum(rule["after"] - rule["before"] for rule in counts["rules"].values())
        left = counts["bytes"] + sum(one["bytes"] for one in gone)
        if counts["bytes_read"] + changed != left:
            broken.append(
                f"{name}: {counts['bytes_read']} bytes of text read and {changed:+} by cleaning, but {left} kept, "
                "dropped or quarantined"
            )
    return broken


def check_laws(ledger: dict[str, Any], where: str) -> None:
    """Raise when a law is broken: a fault of the program, never to be passed over."""
    if broken := broken_laws(ledger):
        raise PilelineError(f"{where}: the ledger does not balance: {'; '.join(broken)}; please report this")


def total(ledgers: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up ledgers of equal block length."""
    if not ledgers:
        raise ValueError("no ledgers to add up")
    summed: dict[str, Any] = Ledger(length=ledgers[0]["length"]).as_dict()
    for ledger in ledgers:
        _sum_into(summed, {key: value for key, value in ledger.items() if key != "length"})
    return summed


def _sum_into(summed: dict[str, Any], counts: dict[str, Any]) -> None:
    for key, value in counts.items():
        if isinstance(value, dict):
            _sum_into(summed.setdefault(key, {}), value)
        elif isinstance(value, int) and not isinstance(value, bool):
            summed[key] = summed.get(key, 0) + value
        else:
            summed[key] = value
