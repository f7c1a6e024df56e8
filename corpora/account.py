"""A ledger as text: the laws worked out, what each rule did, and a table of subsets."""

from typing import Any

from corpora.progress import printable


def text(ledger: dict[str, Any]) -> str:
    """Write a ledger for a terminal."""
    tokens = ledger["text_tokens"] + ledger["special_tokens"]
    lines = [
        f"  lines      {ledger['lines']:,} = {ledger['kept']:,} kept + {sum(ledger['dropped'].values()):,} dropped"
        f" + {sum(ledger['quarantined'].values()):,} quarantined",
        f"  dropped    {_parts(ledger['dropped'])}",
        f"  quarantine {_parts(ledger['quarantined'])}",
        f"  changed    {_parts(ledger['cleaned'])}",
        f"  duplicates {ledger['duplicates']:,} kept that equal an earlier document of their part",
        f"  tokens     {tokens:,} = {ledger['blocks']:,} blocks x {ledger['length']:,} - {ledger['padding']:,} padding"
        f" ({ledger['text_tokens']:,} of text, {ledger['special_tokens']:,} special)",
        "",
        f"  {'subset':<28} {'profile':<14} {'documents':>10} {'MB of text':>11} {'tokens':>14} {'bytes/token':>12}"
        f" {'dropped':>9} {'quarantine':>11}",
    ]
    subsets = sorted(ledger["subsets"].items(), key=lambda item: -item[1]["bytes"])
    for name, counts in subsets:
        profile = counts["profile"] + ("" if counts["known"] else " (unknown)")
        ratio = counts["bytes"] / max(1, counts["tokens"])
        gone = (sum(one["documents"] for one in counts[key].values()) for key in ("dropped", "quarantined"))
        lines.append(
            f"  {printable(name):<28} {profile:<14} {counts['documents']:>10,} {counts['bytes'] / 1e6:>11.2f} "
            f"{counts['tokens']:>14,} {ratio:>12.2f} "
            + " ".join(f"{n:>{w},}" for n, w in zip(gone, (9, 11), strict=True))
        )
    changed = changes(dict(subsets))
    if changed:
        lines += [
            "",
            f"  {'subset':<28} {'rule':<22} {'documents':>10} {'bytes before':>14} {'bytes after':>14}",
        ]
    for name, rule, counts in changed:
        lines.append(
            f"  {printable(name):<28} {rule:<22} {counts['documents']:>10,} {counts['before']:>14,} {counts['after']:>14,}"
        )
    return "\n".join(lines)


def changes(subsets: dict[str, Any]) -> list[tuple[str, str, dict[str, int]]]:
    """Return what each rule did to each subset: documents, and bytes before and after; a drop leaves none."""
    return [
        (name, rule, counts)
        for name, subset in subsets.items()
        for rule, counts in (
            *subset["rules"].items(),
            *(
                (f"{rule} (dropped)", {"documents": one["documents"], "before": one["bytes"], "after": 0})
                for rule, one in subset["dropped"].items()
            ),
        )
    ]


def _parts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "none"
