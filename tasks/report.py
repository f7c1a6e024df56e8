"""What a person reads afterwards: the ledger, the loss, bits per byte, the samples, the nights.

Functions that end in `_markdown` only make text; `publish_*` hand it to the server.  Each `publish` adds a
version under its key, so the page of an artifact shows its history.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.actions import ArtifactUpdate

from corpora import account, card
from corpora.ledger import check_laws
from corpora.ledger import total as add_up
from corpora.prepare import Prepared, beside, read_manifest
from corpora.settings import DataSettings
from models.loggers import note
from tasks import picture
from tasks.history import Night
from tasks.progress import artifact_key

log = logging.getLogger(__name__)

Ledger = Mapping[str, Any]

CURVE_EVERY = 60.0  # seconds between two pictures of the loss while training runs
SCORED_EVERY = 10.0  # the same, when there is a new held-out loss
NOTES = 20  # of steps passed over, and of roll-backs, that a page lists

# What a line of metrics.jsonl may hold, as columns of a table.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "val_loss": ("held-out loss", "{:.4f}".format),
    "val_bpb": ("bits per byte", "{:.4f}".format),
    "tokens_per_s": ("tokens/s", "{:,.0f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "memory_bytes": ("memory", lambda size: f"{size / 2**30:.1f} GiB"),
}


@task(task_run_name="report {run.name}", cache_policy=NO_CACHE)
def ledger(run: Path, settings: DataSettings, prepared: Sequence[Mapping[str, Any]]) -> None:
    """Publish what became of every line of every shard, and lay the dataset card beside the blocks."""
    manifest = Path(prepared[0]["manifest"])
    card.update(settings, beside(Prepared(manifest, read_manifest(manifest), skipped=True)))
    ledgers = {one["shard"]: one["ledger"] for one in prepared}
    publish(run, "ledger", f"Every line of {len(ledgers)} shards", ledger_markdown(run.name, ledgers))


class LossPage:
    """The loss of a run, brought up to date while it trains.

    A new held-out loss makes a new version under the page's key.  What comes between two of them changes the
    newest version, or weeks of training would leave thousands, each with a picture of its own.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._id: UUID | None = None
        self._published = time.monotonic()
        self._scored = False

    def due(self, line: Mapping[str, Any]) -> bool:
        """Take note of a line of metrics.jsonl; say whether it is time to publish."""
        self._scored = self._scored or line.get("val_loss") is not None
        since = time.monotonic() - self._published
        if since < (SCORED_EVERY if self._scored else CURVE_EVERY):
            return False
        self._published = time.monotonic()
        return True

    def publish(self) -> None:
        """Publish the loss so far."""
        scored, self._scored = self._scored, False
        markdown = curve_markdown(self.run.name, read_metrics(self.run))
        if scored or self._id is None:
            self._id = publish(self.run, "loss", "Loss over the steps", markdown)
            return
        try:
            with get_client(sync_client=True) as client:
                client.update_artifact(self._id, ArtifactUpdate(data=markdown))
        except Exception as error:
            log.warning(
                "the loss of %s could not be shown (%s: %s)", self.run.name, type(error).__name__, error
            )
            self._id = None  # the page may be gone


def publish_scores(run: Path, scores: Mapping[str, Any]) -> None:
    """Publish bits per byte of held-out text."""
    publish(run, "bits-per-byte", "Held-out bits per byte", scores_markdown(run.name, scores))


def publish_samples(run: Path, tested: Mapping[str, Any]) -> None:
    """Publish what the model wrote, and what was checked about it."""
    publish(run, "samples", "What the model writes", samples_markdown(run.name, tested))


def publish_nights(nights: Sequence[tuple[Night, Night | None]], failures: Mapping[str, str]) -> None:
    """Publish tonight's scores of all recipes on one page."""
    _publish("nightly", "Bits per byte tonight", nights_markdown(nights, failures))


def publish(run: Path, what: str, description: str, markdown: str) -> UUID | None:
    """Publish one page of a run; return the id of the version that it made."""
    return _publish(artifact_key(run.name, what), description, markdown)


def _publish(key: str, description: str, markdown: str) -> UUID | None:
    """A report is not worth the loss of what it reports on: with the server away, the run goes on."""
    try:
        made = create_markdown_artifact(markdown, key=key, description=description)
    except Exception as error:
        log.warning("the page %r could not be published (%s: %s)", key, type(error).__name__, error)
        return None
    return made if isinstance(made, UUID) else None


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


def curve_markdown(name: str, metrics: Sequence[dict[str, Any]]) -> str:
    """Return the picture of the loss, the held-out losses as a table, and what went wrong on the way."""
    trained = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    held_out = [m for m in metrics if m.get("val_loss") is not None]
    notes = [m for m in metrics if note(m) is not None]
    lines = [
        picture.Line("training", trained),
        picture.Line("held out", [(m["step"], m["val_loss"]) for m in held_out], dots=len(held_out) <= 60),
    ]
    marks = [
        picture.Mark("skipped step", m["step"], "c")
        if "skipped" in m
        else picture.Mark("roll-back", m["step"], "d")
        for m in notes
    ]
    svg = picture.curve(f"Loss of {name}", "step", "nats per token", lines, marks)
    keys = [key for key in COLUMNS if any(m.get(key) is not None for m in held_out)]
    rows = [[m["step"], *("–" if m.get(k) is None else COLUMNS[k][1](m[k]) for k in keys)] for m in held_out]
    table = _table(["step", *(COLUMNS[key][0] for key in keys)], _thinned(rows, 12))
    last = [so_far(m) for m in metrics if "steps" in m and note(m) is None][-1:]
    parts = [picture.markdown(svg, "loss over steps"), *last, table]
    if notes:
        parts += [
            f"## {_counted(notes)}",
            "\n".join(f"- step {m['step']:,}: {_cell(note(m) or '')}" for m in notes[-NOTES:]),
        ]
    return "\n\n".join(parts) + "\n"


def so_far(line: Mapping[str, Any]) -> str:
    """Say how far training is: step, loss, speed and the time left."""
    parts = [f"step {line['step']:,} of {line['steps']:,}"]
    if line.get("loss") is not None:
        parts.append(f"loss {line['loss']:.3f}")
    if line.get("tokens_per_s"):
        parts.append(f"{line['tokens_per_s']:,.0f} tokens/s")
    if left := time_left(line):
        parts.append(f"{left} left")
    return ", ".join(parts)


def time_left(line: Mapping[str, Any]) -> timedelta | None:
    """Return how long the steps left will take at the speed of the last ones; None when nothing tells."""
    if not line.get("tokens_per_s") or not line["step"]:
        return None
    tokens = line["tokens"] / line["step"] * (line["steps"] - line["step"])
    return timedelta(seconds=round(tokens / line["tokens_per_s"]))


def _counted(notes: Sequence[Mapping[str, Any]]) -> str:
    skipped = sum("skipped" in m for m in notes)
    counts = ((skipped, "skipped step"), (len(notes) - skipped, "roll-back"))
    told = [f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count]
    last = f", the last {NOTES}" if len(notes) > NOTES else ""
    return f"{' and '.join(told)}{last}"


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
