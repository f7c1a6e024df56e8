"""The pages of a run: exact tables for small numbers, pictures that parse."""

import base64
import json
import re
import uuid
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from corpora.errors import InputError, PilelineError
from tasks import history, picture, report

SVG = "{http://www.w3.org/2000/svg}"


def subset(**counts: Any) -> dict[str, Any]:
    none = {"duplicates": 0, "rules": {}, "dropped": {}, "quarantined": {}}
    return {"profile": "safe", "known": True, **none, **counts}


ONE = {
    "lines": 10,
    "kept": 7,
    "dropped": {"min_chars": 2},
    "quarantined": {"json": 1},
    "cleaned": {"newlines": 3},
    "text_tokens": 1_190,
    "special_tokens": 14,
    "blocks": 5,
    "length": 256,
    "padding": 76,
    "duplicates": 1,
    "subsets": {
        "A|b": subset(
            read=6,
            bytes_read=3_220,
            documents=4,
            bytes=3_000,
            tokens=1_000,
            duplicates=1,
            rules={"newlines": {"documents": 3, "before": 500, "after": 490}},
            dropped={"min_chars": {"documents": 2, "bytes": 210}},
        ),
        "c": subset(read=3, bytes_read=380, documents=3, bytes=380, tokens=190),
    },
}
NIGHT = history.Night(
    time="2026-01-02T03:00:00+00:00",
    recipe="demo",
    checkpoint="runs/demo-1/checkpoints/step-0000100",
    step=100,
    eval_set="e1",
    bits_per_byte=2.0,
    subsets={"python": 1.5, "docs": 2.5},
    samples=({"prompt": "The", "text": "end ``` of"},),
)


def pictures(markdown: str) -> list[ElementTree.Element]:
    """Return the parsed pictures of a page."""
    found = re.findall(r"!\[[^\]]*\]\(data:image/svg\+xml;base64,([^)]*)\)", markdown)
    return [ElementTree.fromstring(base64.b64decode(one)) for one in found]


def test_the_ledger_is_a_table_per_shard_and_in_total() -> None:
    page = report.ledger_markdown("demo-1", {"train/00": ONE, "val": ONE})
    assert "| train/00 | 10 | 7 | 2 | 1 | 1,190 | 14 | 5 | 76 |\n" in page
    assert "| **all** | 20 | 14 | 4 | 2 | 2,380 | 28 | 10 | 152 |\n" in page
    assert "- lines 20 = kept 14 + dropped 4 + quarantined 2\n" in page
    assert "- text tokens 2,380 + specials 28 = blocks 10 × length 256 − padding 152\n" in page
    assert "| A\\|b | 8 | 2 | 6,000 | 2,000 | 84.0% | 3.00 |\n" in page
    assert "| A\\|b | newlines | 6 | 1,000 | 980 |\n" in page
    assert "| A\\|b | min\\_chars (dropped) | 4 | 420 | 0 |\n" in page
    assert "## Dropped, by rule\n\n| rule | documents |\n|---|--:|\n| min\\_chars | 4 |\n" in page
    assert "## Quarantined, by reason\n\n| reason | documents |\n|---|--:|\n| json | 2 |\n" in page


@pytest.mark.parametrize("key", ["lines", "text_tokens", "padding"])
def test_a_ledger_that_does_not_add_up_is_refused(key: str) -> None:
    with pytest.raises(PilelineError, match=r"^val: the ledger does not balance: "):
        report.ledger_markdown("demo-1", {"train/00": ONE, "val": {**ONE, key: ONE[key] + 1}})


def test_the_loss_is_a_curve_with_ticks_and_a_table() -> None:
    metrics = [{"step": 0, "val_loss": 10.8, "val_bpb": 4.5}]
    metrics += [{"step": s, "loss": 10 - s / 50} for s in range(10, 210, 10)]
    metrics += [{"step": 200, "loss": 6.0, "val_loss": 6.1, "val_bpb": 2.5}]
    page = report.curve_markdown("demo-1", metrics)
    (svg,) = pictures(page)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"Loss of demo-1", "step", "nats per token", "training", "held out", "0", "100", "200"} <= set(
        texts
    )
    assert len(list(svg.iter(f"{SVG}circle"))) == 2  # one for each held-out loss
    assert "| 0 | 10.8000 | 4.5000 |\n| 200 | 6.1000 | 2.5000 |" in page


def test_a_loss_that_is_not_finite_is_left_out_of_the_picture() -> None:
    (svg,) = pictures(report.curve_markdown("x", [{"step": 1, "loss": float("nan")}]))
    assert "no points yet" in [text.text for text in svg.iter(f"{SVG}text")]


def test_the_page_tells_speed_memory_and_what_went_wrong() -> None:
    metrics: list[dict[str, Any]] = [
        {"step": 0, "steps": 400, "tokens": 0, "val_loss": 10.8, "val_bpb": 4.5},
        {"step": 30, "steps": 400, "skipped": "the loss is nan"},
        {"step": 100, "steps": 400, "rolled_back_from": 150, "reason": "gradient norm 90.0 <b>"},
        {
            "step": 200,
            "steps": 400,
            "tokens": 2_000_000,
            "loss": 6.0,
            "tokens_per_s": 31_000.4,
            "mfu": 0.512,
            "memory_bytes": 3 << 29,
            "val_loss": 6.1,
            "val_bpb": 2.5,
        },
    ]
    page = report.curve_markdown("demo-1", metrics)
    assert "\n\nstep 200 of 400, loss 6.000, 31,000 tokens/s, 0:01:05 left\n\n" in page
    assert "| step | held-out loss | bits per byte | tokens/s | MFU | memory |\n" in page
    assert "| 0 | 10.8000 | 4.5000 | – | – | – |\n" in page
    assert "| 200 | 6.1000 | 2.5000 | 31,000 | 51.2% | 1.5 GiB |" in page
    assert "## 1 skipped step and 1 roll-back\n\n- step 30: update skipped: the loss is nan\n" in page
    assert "- step 100: rolled back from step 150: gradient norm 90.0 \\<b\\>\n" in page
    (svg,) = pictures(page)
    marks = [path for path in svg.iter(f"{SVG}path") if path.attrib["class"].startswith("mark")]
    assert [path.attrib["class"] for path in marks] == [
        "mark c",
        "mark d",
    ] * 2  # in the legend, in the picture
    assert {"skipped step", "roll-back"} <= {text.text for text in svg.iter(f"{SVG}text")}


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        # the same after a resume: tokens are counted from the beginning
        ({"step": 300, "steps": 400, "tokens": 300_000, "tokens_per_s": 1000.0}, 100),
        ({"step": 400, "steps": 400, "tokens": 400_000, "tokens_per_s": 1000.0}, 0),
        ({"step": 0, "steps": 400, "tokens": 0, "tokens_per_s": None}, None),
        ({"step": 1, "steps": 400, "tokens": 1000, "tokens_per_s": None}, None),
    ],
)
def test_the_time_left(line: dict[str, Any], seconds: int | None) -> None:
    left = report.time_left(line)
    assert (None if left is None else left.total_seconds()) == seconds


def test_a_long_curve_keeps_its_ends_and_its_spikes() -> None:
    points = [(float(x), 3.0 + x % 7 / 100) for x in range(50_000)]
    points[31_234] = (31_234.0, 99.0)
    points[777] = (777.0, 0.5)
    kept = picture.thin(points)
    assert len(kept) <= picture.POINTS + 2 and kept == sorted(kept)
    assert {points[0], points[-1], points[31_234], points[777]} <= set(kept) <= set(points)
    assert picture.thin(points[:400]) == points[:400]


def test_the_loss_is_published_anew_with_each_held_out_loss_and_else_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = {"s": 0.0}, []
    monkeypatch.setattr(report.time, "monotonic", lambda: now["s"])
    page = report.LossPage(tmp_path)
    line, scored = {"step": 1}, {"step": 2, "val_loss": 1.0}
    assert [
        (now.update(s=seconds), page.due(what))[1]
        for seconds, what in (
            (1, line),
            (59, line),
            (60, line),
            (65, scored),
            (69, line),
            (70, line),
            (71, line),
        )
    ] == [False, False, True, False, False, True, False]

    class Client:
        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update_artifact(self, identity: uuid.UUID, artifact: Any) -> None:
            calls.append(("changed", identity))

    def create(markdown: str, key: str, description: str) -> uuid.UUID:
        made = uuid.uuid4()
        calls.append(("made", made))
        return made

    monkeypatch.setattr(report, "create_markdown_artifact", create)
    monkeypatch.setattr(report, "get_client", lambda sync_client: Client())
    page = report.LossPage(tmp_path)
    page.publish()
    page.publish()
    page.due(scored)
    page.publish()
    page.publish()
    assert [what for what, _ in calls] == ["made", "changed", "made", "changed"]
    assert calls[0][1] == calls[1][1] != calls[2][1] == calls[3][1]


def test_the_scores_are_bars_largest_first() -> None:
    scores = {
        "step": 1200,
        "bits_per_byte": 2.0,
        "documents": 5,
        "bytes": 9_999,
        "subsets": {
            "a": {"documents": 2, "bytes": 4_000, "bits_per_byte": 1.5},
            "<b>": {"documents": 3, "bytes": 5_999, "bits_per_byte": 2.5},
        },
    }
    page = report.scores_markdown("demo-1", scores)
    (svg,) = pictures(page)
    widths = [float(bar.attrib["width"]) for bar in svg.iter(f"{SVG}rect")][1:]
    assert widths == sorted(widths, reverse=True) and widths[1] == pytest.approx(widths[0] * 0.6, abs=0.1)
    assert [t.text for t in svg.iter(f"{SVG}text")][1:] == ["<b>", "2.500", "a", "1.500"]
    assert page.index("| \\<b\\> | 3 | 5,999 | 2.5000 |") < page.index("| a | 2 | 4,000 | 1.5000 |")
    assert "| **all** | 5 | 9,999 | **2.0000** |" in page


def test_a_sample_cannot_leave_its_fence() -> None:
    text = "before\n```\n# after"
    samples = [
        {"prompt": "", "method": "top_p", "text": text, "new_tokens": 9, "ended": False},
        {"prompt": "def", "method": "greedy", "text": " main", "new_tokens": 1, "ended": True},
        {"prompt": "def", "method": "top_p", "text": "\n  ", "new_tokens": 2, "ended": False},
    ]
    checks = [{"check": "finite", "passed": True}]
    page = report.samples_markdown("demo-1", {"samples": samples, "checks": checks})
    assert page == (
        "# What demo-1 writes\n\n"
        "### (empty: from the start of a document)\n\ntop-p, 9 new tokens, cut at the limit\n\n"
        f"````text\n{text}\n````\n\n"
        "### def\n\ngreedy, 1 new tokens, ended by itself\n\n```text\ndef main\n```\n\n"
        "top-p, 2 new tokens, cut at the limit, **nothing but white space**\n\n```text\ndef\n  \n```\n\n"
        "## Checks\n\n- ✓ finite\n"
    )


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (None, "first night"),
        ({"bits_per_byte": 2.25, "checkpoint": "other"}, "-0.2500"),
        ({"bits_per_byte": 1.5, "checkpoint": "other"}, "+0.5000"),
        ({}, "+0.0000, same checkpoint"),
        ({"eval_set": "e2", "bits_per_byte": 1.0}, "not comparable: other held-out text"),
    ],
)
def test_the_change_since_the_last_night(before: dict[str, object] | None, said: str) -> None:
    earlier = None if before is None else NIGHT.model_copy(update=before)
    assert report.change(NIGHT, earlier) == said


def test_the_page_of_the_night_names_changes_and_failures() -> None:
    earlier = NIGHT.model_copy(update={"subsets": {"python": 1.75}, "bits_per_byte": 2.5, "checkpoint": "c"})
    page = report.nights_markdown([(NIGHT, earlier)], {"13m": "no blocks"})
    assert "| demo | 100 | 2.0000 | -0.5000 |\n| 13m |  |  | failed |\n" in page
    assert "| docs | 2.5000 | – |\n| python | 1.5000 | -0.2500 |" in page
    assert "- **13m** failed: no blocks" in page
    assert "````text\nTheend ``` of\n````" in page
    assert len(pictures(page)) == 1


def test_the_history_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "nightly.jsonl"
    assert history.read(path) == []
    other = NIGHT.model_copy(update={"recipe": "13m"})
    newer = NIGHT.model_copy(update={"step": 200})
    history.append(path, [NIGHT, other])
    history.append(path, [newer])
    assert history.read(path) == [NIGHT, other, newer]
    assert history.last(history.read(path), "demo") == newer
    assert history.last(history.read(path), "2b") is None
    assert [p.name for p in path.parent.iterdir()] == ["nightly.jsonl"]


def test_a_broken_line_of_the_history_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nightly.jsonl"
    history.append(path, [NIGHT])
    path.write_text(path.read_text() + '{"recipe": "de\n')
    with pytest.raises(InputError, match=r"nightly\.jsonl:2: not a line of ours"):
        history.read(path)


def test_metrics_leave_out_the_line_that_is_being_written(tmp_path: Path) -> None:
    assert report.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert report.read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1200, [0, 250, 500, 750, 1000, 1250]),
        (2.31, 10.8, [2, 4, 6, 8, 10, 12]),
        (5, 5, [5, 6, 7, 8, 9, 10]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert picture.ticks(low, high) == pytest.approx(expected)
