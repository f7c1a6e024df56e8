"""The exact account of a shard: where every line and every token went."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from corpora.errors import PilelineError


@dataclass
class Ledger:
    """Counts of one shard.  Two laws hold, or the step fails:

    lines = kept + dropped + quarantined
    text tokens + special tokens = blocks x length - padding
    """

    length: int
    lines: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # rule -> documents
    quarantined: Counter[str] = field(default_factory=Counter)  # reason -> lines
    cleaned: Counter[str] = field(
        default_factory=Counter
    )  # rule -> documents changed, and kept or dropped later
    text_tokens: int = 0
    special_tokens: int = 0
    blocks: int = 0
    padding: int = 0
    subsets: dict[str, Counter[str]] = field(default_factory=dict)  # name -> documents, bytes, tokens

    def keep(self, subset: str, text_bytes: int, text_tokens: int, special_tokens: int) -> None:
        """Count one document that goes into the blocks; bytes are UTF-8 bytes of the cleaned text."""
        self.kept += 1
        self.text_tokens += text_tokens
        self.special_tokens += special_tokens
        counts = self.subsets.setdefault(subset, Counter(documents=0, bytes=0, tokens=0))
        counts.update(documents=1, bytes=text_bytes, tokens=text_tokens)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "length": self.length,
            "lines": self.lines,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "quarantined": dict(self.quarantined),
            "cleaned": dict(self.cleaned),
            "text_tokens": self.text_tokens,
            "special_tokens": self.special_tokens,
            "blocks": self.blocks,
            "padding": self.padding,
            "subsets": {name: dict(counts) for name, counts in self.subsets.items()},
        }


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
    for key, whole in (("documents", "kept"), ("tokens", "text_tokens")):
        parts = sum(counts[key] for counts in ledger["subsets"].values())
        if parts != ledger[whole]:
            broken.append(f"{ledger[whole]} {whole}, but {parts} {key} in the subsets")
    return broken


def check_laws(ledger: dict[str, Any], where: str) -> None:
    """Raise when a law is broken: a fault of the program, never to be passed over."""
    if broken := broken_laws(ledger):
        raise PilelineError(f"{where}: the ledger does not balance: {'; '.join(broken)}; please report this")


def total(ledgers: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up ledgers of equal block length."""
    if not ledgers:
        raise ValueError("no ledgers to add up")
    summed = Ledger(length=ledgers[0]["length"]).as_dict()
    for ledger in ledgers:
        for key, value in ledger.items():
            if key == "subsets":
                for name, counts in value.items():
                    summed[key][name] = dict(Counter(summed[key].get(name, {})) + Counter(counts))
            elif isinstance(value, dict):
                summed[key] = dict(Counter(summed[key]) + Counter(value))
            elif key != "length":
                summed[key] += value
    return summed
