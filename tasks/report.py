"""What a person reads afterwards: the ledger, the loss, bits per byte, the samples, the nights.

Functions that end in `_markdown` only make text; `publish_*` hand it to the server.  Each `publish` adds a
version under its key, so the page of an artifact shows its history.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from corpora import account, card
from corpora.ledger import check_laws
from corpora.ledger import total as add_up
from corpora.prepare import Prepared, beside, read_manifest
from corpora.settings import DataSettings
from tasks import picture
from tasks.history import Night
from tasks.progress import artifact_key

log = logging.getLogger(__name__)

Ledger = Mapping[str, Any]


@task(task_run_name="report {run.name}", cache_policy=NO_CACHE)
def ledger(run: Path, settings: DataSettings, prepared: Sequence[Mapping[str, Any]]) -> None:
    """Publish what became of every line of every shard, and lay the dataset card beside the blocks."""
    manifest = Path(prepared[0]["manifest"])
    card.update(settings, beside(Prepared(manifest, read_manifest(manifest), skipped=True)))
    ledgers = {one["shard"]: one["ledger"] for one in prepared}
    publish(run, "ledger", f"Every line of {len(ledgers)} shards", ledger_markdown(run.name, ledgers))


def publish_curve(run: Path) -> None:
    """Publish the loss so far."""
    publish(run, "loss", "Loss over the steps", curve_markdown(run.name, read_metrics(run)))


def publish_scores(run: Path, scores: Mapping[str, Any]) -> None:
    """Publish bits per byte of held-out text."""
    publish(run, "bits-per-byte", "Held-out bits per byte", scores_markdown(run.name, scores))


def publish_samples(run: Path, tested: Mapping[str, Any]) -> None:
    """Publish what the model wrote, and what was checked about it."""
    publish(run, "samples", "What the model writes", samples_markdown(run.name, tested))


def publish_nights(nights: Sequence[tuple[Night, Night | None]], failures: Mapping[str, str]) -> None:
    """Publish tonight's scores of all recipes on one page."""
    _publish("nightly", "Bits per byte tonight", nights_markdown(nights, failures))


def publish(run: Path, what: str, description: str, markdown: str) -> None:
    """Publish one page of a run."""
    _publish(artifact_key(run.name, what), description, markdown)


def _publish(key: str, description: str, markdown: str) -> None:
    """A report is not worth the loss of what it reports on: with the server away, the run goes on."""
    try:
        create_markdown_artifact(markdown, key=key, description=description)
    except Exception as error:
        log.warning("the page %r could not be published (%s: %s)", key, type(error).__name__, error)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read RUN/metrics.jsonl; a last line that is still being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ledger_markdown(name: str, ledgers: Mapping[str, Ledger]) -> str:
    """Return the ledger per shard and in total, with its two laws worked out; a broken law is an error."""
    for shard, one in ledgers.items():
        check_laws(dict(one), shard)
    total = add_up([dict(one) for one in ledgers.values()])
    rows = [
        [shard, *_counts(one)] for shard, one in (*ledgers.items(), ("**all**", total)) if one is not None
    ]
    header = ["shard", "lines", "kept", "dropped", "quarantined"]
    header += ["text tokens", "specials", "blocks", "padding"]
    parts = [
        f"# Ledger of {_cell(name)}",
        _table(header, rows),
        "**The laws**, checked for every shard and shown here for all of them:",
        "\n".join(f"- {law}" for law in laws(total)),
        "## Documents by subset",
        _table(
            [
                "subset",
                "documents",
                "duplicates",
                "text bytes",
                "tokens",
                "share of tokens",
                "bytes per token",
            ],
            [
                [
                    subset,
                    one["documents"],
                    one["duplicates"],
                    one["bytes"],
                    one["tokens"],
                    _share(one["tokens"], total["text_tokens"]),
                    _ratio(one["bytes"], one["tokens"]),
                ]
                for subset, one in sorted(total["subsets"].items(), key=lambda item: -item[1]["tokens"])
            ],
        ),
    ]
    for title, column, counts in (
        ("Dropped, by rule", "rule", total["dropped"]),
        ("Quarantined, by reason", "reason", total["quarantined"]),
    ):
        rows = [[rule, count] for rule, count in sorted(counts.items()) if count]
        parts += [f"## {title}", _table([column, "documents"], rows) if rows else "None."]
    changes = [[subset, rule, *counts.values()] for subset, rule, counts in account.changes(total["subsets"])]
    header = ["subset", "rule", "documents", "bytes before", "bytes after"]
    parts += ["## Cleaning, by subset and rule", _table(header, changes) if changes else "Nothing changed."]
    return "\n\n".join(parts) + "\n"


def laws(one: Ledger) -> list[str]:
    """Return the two laws of a ledger, written out with its numbers."""
    dropped, quarantined = sum(one["dropped"].values()), sum(one["quarantined"].values())
    return [
        f"lines {one['lines']:,} = kept {one['kept']:,} + dropped {dropped:,} + quarantined {quarantined:,}",
        f"text tokens {one['text_tokens']:,} + specials {one['special_tokens']:,} = "
        f"blocks {one['blocks']:,} × length {one['length']:,} − padding {one['padding']:,}",
    ]


def curve_markdown(name: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the picture of the loss and the held-out losses as a table."""
    trained = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    held_out = [m for m in metrics if m.get("val_loss") is not None]
    lines = [
        picture.Line("training", trained),
        picture.Line("held out", [(m["step"], m["val_loss"]) for m in held_out], dots=len(held_out) <= 60),
    ]
    svg = picture.curve(f"Loss of {name}", "step", "nats per token", lines)
    rows = [[m["step"], f"{m['val_loss']:.4f}", f"{m['val_bpb']:.4f}"] for m in held_out]
    table = _table(["step", "held-out loss", "bits per byte"], _thinned(rows, 12))
    return f"{picture.markdown(svg, 'loss over steps')}\n\n{table}\n"


def scores_markdown(name: str, scores: Mapping[str, Any]) -> str:
    """Return bits per byte per subset, as a picture and as a table."""
    subsets = scores["subsets"]
    values = {subset: one["bits_per_byte"] for subset, one in subsets.items()}
    svg = picture.bars(f"Held-out bits per byte of {name}, step {scores['step']:,}", values)
    rows = [
        [subset, one["documents"], one["bytes"], f"{one['bits_per_byte']:.4f}"]
        for subset, one in sorted(subsets.items(), key=lambda item: -item[1]["bits_per_byte"])
    ]
    rows.append(["**all**", scores["documents"], scores["bytes"], f"**{scores['bits_per_byte']:.4f}**"])
    table = _table(["subset", "documents", "bytes", "bits per byte"], rows)
    return f"{picture.markdown(svg, 'bits per byte by subset')}\n\n{table}\n"


def samples_markdown(name: str, tested: Mapping[str, Any]) -> str:
    """Return every sample, its prompt in front, in a fence that its own text cannot close; and the checks."""
    parts = [f"# What {_cell(name)} writes"]
    prompt = None
    for sample in tested["samples"]:
        if sample["prompt"] != prompt:
            prompt = sample["prompt"]
            parts.append(f"### {_prompt(sample)}")
        ended = "ended by itself" if sample["ended"] else "cut at the limit"
        blank = "" if sample["text"].strip() else ", **nothing but white space**"
        parts.append(
            f"{sample['method'].replace('_', '-')}, {sample['new_tokens']} new tokens, {ended}{blank}"
        )
        parts.append(_fenced(sample["prompt"] + sample["text"]))
    parts.append("## Checks")
    parts.append("\n".join(f"- {'✓' if c['passed'] else '✗'} {_cell(c['check'])}" for c in tested["checks"]))
    return "\n\n".join(parts) + "\n"


def nights_markdown(nights: Sequence[tuple[Night, Night | None]], failures: Mapping[str, str]) -> str:
    """Return tonight's scores beside those of each recipe's night before."""
    rows = [[now.recipe, now.step, f"{now.bits_per_byte:.4f}", change(now, before)] for now, before in nights]
    rows += [[recipe, "", "", "failed"] for recipe in failures]
    parts = ["# The night", _table(["recipe", "step", "bits per byte", "since the last night"], rows)]
    parts += [f"- **{_cell(recipe)}** failed: {_cell(error)}" for recipe, error in failures.items()]
    for now, before in nights:
        comparable = before is not None and before.eval_set == now.eval_set
        earlier = before.subsets if before is not None and comparable else {}
        rows = [
            [subset, f"{value:.4f}", f"{value - earlier[subset]:+.4f}" if subset in earlier else "–"]
            for subset, value in sorted(now.subsets.items(), key=lambda item: -item[1])
        ]
        parts += [
            f"## {_cell(now.recipe)}",
            picture.markdown(
                picture.bars(f"Bits per byte of {now.recipe}, step {now.step:,}", now.subsets),
                f"bits per byte of {now.recipe}",
            ),
            _table(["subset", "bits per byte", "change"], rows),
        ]
        for sample in now.samples:
            parts += [f"### {_prompt(sample)}", _fenced(sample["prompt"] + sample["text"])]
    return "\n\n".join(parts) + "\n"


def change(now: Night, before: Night | None) -> str:
    """Say how bits per byte moved since the night before."""
    if before is None:
        return "first night"
    if before.eval_set != now.eval_set:
        return "not comparable: other held-out text"
    moved = f"{now.bits_per_byte - before.bits_per_byte:+.4f}"
    return f"{moved}, same checkpoint" if before.checkpoint == now.checkpoint else moved


def _counts(one: Ledger) -> list[int]:
    return [
        one["lines"],
        one["kept"],
        sum(one["dropped"].values()),
        sum(one["quarantined"].values()),
        one["text_tokens"],
        one["special_tokens"],
        one["blocks"],
        one["padding"],
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a markdown table; the columns after the first are numbers, set to the right."""
    lines = [f"| {' | '.join(header)} |", f"|---{'|--:' * (len(header) - 1)}|"]
    for first, *others in rows:
        cells = [f"{cell:,}" if isinstance(cell, int) else _cell(str(cell)) for cell in others]
        lines.append(f"| {' | '.join([_cell(str(first)), *cells])} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return text that markdown takes as it is; names of subsets and prompts come from outside."""
    escaped = re.sub(r"([\\`|<>\[\]_#])", r"\\\1", " ".join(text.split()))
    return escaped if len(escaped) <= 300 else escaped[:299] + "…"


def _prompt(sample: Mapping[str, Any]) -> str:
    return _cell(sample["prompt"]) or "(empty: from the start of a document)"


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _thinned(rows: list[list[object]], most: int) -> list[list[object]]:
    """Return at most `most` rows, evenly picked, the first and the last always."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _ratio(above: int, below: int) -> str:
    return f"{above / below:.2f}" if below else "–"
