"""metrics.jsonl, the line of a step as a person reads it, and the bar with its time left."""

import json
import sys
from io import StringIO
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import metrics
from models.metrics import Metrics, Pace, readable

STEP = {"step": 100, "steps": 350, "tokens": 102_000, "loss": 3.5, "lr": 0.01, "tokens_per_s": 1020.0}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            {"step": 0, "steps": 350, "tokens": 0, "loss": None, "val_loss": 10.3252, "val_bpb": 6.4852},
            "step 0/350  held-out loss 10.325  6.485 bits per byte",
        ),
        (STEP, "step 100/350  loss 3.500  lr 0.01  1,020 tokens/s  0:04:10 left"),
        # What the first step's speed says of the rest is wrong.
        ({**STEP, "step": 1, "tokens": 1020}, "step 1/350  loss 3.500  lr 0.01  1,020 tokens/s"),
        (
            {**STEP, "step": 2000, "steps": 2000, "lr": None, "grad_norm": 0.514},
            "step 2,000/2,000  loss 3.500  gradient 0.51  1,020 tokens/s",
        ),
        (
            {"step": 8, "steps": 8, "tokens": 9, "loss": 2.0, "mfu": 0.4531, "memory_bytes": 12_025_908_429},
            "step 8/8  loss 2.000  MFU 45.3%  11.2 GiB",
        ),
        ({"step": 8, "steps": 8, "tokens": 9, "loss": 2.0, "mfu": None}, "step 8/8  loss 2.000"),
        (
            {"step": 8, "steps": 8, "tokens": 9, "loss": None, "grad_norm": None}
            | {"not_finite": {"loss": "nan", "grad_norm": "inf"}},
            "step 8/8  loss nan  gradient inf",
        ),
        (
            {"step": 1200, "skipped": "the gradient norm 53.1 is above 10 times 1.2"},
            "step 1,200  update skipped: the gradient norm 53.1 is above 10 times 1.2",
        ),
        (
            {"step": 500, "steps": 2000, "rolled_back_from": 1520, "reason": "4 bad steps in a row"},
            "step 500/2,000  rolled back from step 1,520: 4 bad steps in a row",
        ),
    ],
)
def test_what_is_told(line: dict[str, Any], told: str) -> None:
    assert readable(line) == told


def test_a_known_time_left_is_told_instead_of_a_guess() -> None:
    assert readable(STEP, 3600.4).endswith("1,020 tokens/s  1:00:00 left")


def make(run: Path, **changes: Any) -> Metrics:
    return Metrics(run, **{"write": True, "events": False, "steps": 350, **changes})


def lines(run: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = [json.loads(x, parse_constant=refuse) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in read]


NOTE = {"step": 100, "rolled_back_from": 120, "reason": "bad"}


def test_lines_go_to_the_file_and_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path)
    made.cut_after(-1)
    made.add(STEP)
    made.add(NOTE)
    assert lines(tmp_path) == [STEP, NOTE]
    assert capsys.readouterr().out.splitlines() == [readable(STEP), readable({**NOTE, "steps": 350})]


def test_events_are_the_lines_of_the_file_and_always_have_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(tmp_path, events=True)
    made.cut_after(-1)
    made.at(99)
    made.add(STEP)
    made.add(NOTE)
    step, note = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step, note] == [{"event": "metrics", "steps": 350, **line} for line in written]


def test_the_time_of_each_line_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "time", lambda: 1700000000.12345)
    made = make(tmp_path)
    made.add(STEP)
    monkeypatch.undo()
    made.cut_after(100)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["time"] == 1700000000.123


def test_what_is_not_finite_is_null_with_its_name(tmp_path: Path) -> None:
    make(tmp_path).add({**STEP, "loss": float("nan"), "lr": float("-inf")})
    wanted = {**STEP, "loss": None, "lr": None, "not_finite": {"loss": "nan", "lr": "-inf"}}
    assert lines(tmp_path) == [wanted]
    make(tmp_path).cut_after(100)
    assert lines(tmp_path) == [wanted]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    make(tmp_path).cut_after(100)
    assert lines(tmp_path) == [{"step": 1, "loss": None, "not_finite": {"loss": "nan"}}]


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path, write=False, log_to=("tensorboard",))
    made.cut_after(-1)
    made.at(1, 2.0)
    made.add(STEP)
    made.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


SKIPPED = {"step": 2, "skipped": "bad"}


def back(step: int, start: int) -> dict[str, Any]:
    return {"step": step, "rolled_back_from": start, "reason": "bad"}


@pytest.mark.parametrize(
    ("before", "step", "roll_backs", "after"),
    [
        ([1, 2, 3, 4], 2, 0, [1, 2]),
        ([1, 2], -1, 0, []),
        ([], 5, 0, []),
        # The roll-back that the checkpoint of step 2 does not know of will be made again.
        ([1, 2, back(2, 4), 3], 2, 0, [1, 2]),
        ([1, 2, back(2, 4), 3, 4, back(2, 5)], 2, 1, [1, 2, back(2, 4)]),
        ([1, 2, back(2, 4), 3, 4, back(4, 6), 5], 4, 2, [1, 2, back(2, 4), 3, 4, back(4, 6)]),
        ([1, 2, back(2, 4), 3, 4, back(4, 6), 5], 3, 2, [1, 2, back(2, 4), 3]),
        ([1, SKIPPED, 2, {"step": 3, "skipped": "bad"}], 2, 0, [1, SKIPPED, 2]),
    ],
)
def test_what_is_cut(tmp_path: Path, before: list[Any], step: int, roll_backs: int, after: list[Any]) -> None:
    def whole(short: list[Any]) -> list[dict[str, Any]]:
        return [{"step": line} if isinstance(line, int) else line for line in short]

    made = make(tmp_path)
    for line in whole(before):
        made.add(line)
    made.cut_after(step, roll_backs)
    assert lines(tmp_path) == whole(after)
    made.add({"step": 9})
    assert lines(tmp_path) == [*whole(after), {"step": 9}]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b"\xff\x00", b"17", b"null", b"[1]", b"{}", b'{"step": "3"}']
)
def test_a_line_that_is_torn_or_none_of_ours_is_dropped(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + torn + b'\n{"step": 2}\n' + torn)
    make(tmp_path).cut_after(5)
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(metrics, "monotonic", lambda: self.now)


def test_the_bar_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, terminal = Clock(monkeypatch), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run = tmp_path / "demo-1234"
    run.mkdir()
    made = make(run, steps=1000)
    made.cut_after(500)
    for step in range(501, 511):
        clock.now += 90.0 if step < 503 else 2.0  # the first two steps make kernels
        made.at(step, 3.25)
    made.add({"step": 510, "steps": 1000, "tokens": 1, "loss": 3.125, "val_bpb": 2.5, "tokens_per_s": 1e3})
    clock.now += 2.0
    made.at(511)
    made.close()
    pictures = terminal.getvalue().replace("\n", "\r").split("\r")
    assert [picture for picture in pictures if "501/1000" in picture and "loss 3.250" in picture]
    assert " 0/1000" not in terminal.getvalue()
    shown = "511/1000, loss 3.125, 2.500 bits per byte, 1,000 tokens/s, 0:16:18 left"
    assert [picture for picture in pictures if picture.startswith("demo-1234  51%|") and shown in picture]
    assert "12:" not in terminal.getvalue()  # what the slow steps would have told
    out = capsys.readouterr().out
    assert "step 510/1,000  loss 3.125  2.500 bits per byte  1,000 tokens/s  0:16:20 left" in out


@pytest.mark.parametrize("to", [2, 4])  # the failed step 5 is not told
def test_the_bar_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: int) -> None:
    clock, terminal = Clock(monkeypatch), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    made = make(tmp_path, steps=100)
    made.cut_after(-1)
    for step in [1, 2, 3, 4]:
        clock.now += 1.0
        made.at(step)
    made.cut_after(to)
    clock.now += 500.0  # to load the checkpoint
    made.at(to + 1)
    clock.now += 1.0
    made.at(to + 2)
    made.close()
    assert terminal.getvalue().rstrip().endswith(f" {to + 2}/100, 0:01:{38 - to} left")


def test_steps_are_cheap_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    made = make(tmp_path, steps=1_000_000)
    started = process_time()
    for step in range(20_000):
        made.at(step, 1.0)
    spent = process_time() - started
    made.close()
    assert spent / 20_000 < 20e-6
    assert terminal.getvalue().count("\r") < 50


@given(st.lists(st.floats(0.01, 10.0), min_size=3, max_size=60), st.integers(0, 5000))
def test_the_time_left_is_the_mean_of_all_steps_but_the_first(seconds: list[float], start: int) -> None:
    pace, now = Pace(start + 10_000), 0.0
    pace.at(start, now)
    for done, one in enumerate(seconds, 1):
        now += one
        pace.at(start + done, now)
    mean = sum(seconds[1:]) / (len(seconds) - 1)
    step = start + len(seconds)
    assert pace.left(step) == pytest.approx((start + 10_000 - step) * mean)


def test_the_time_left_forgets() -> None:
    pace = Pace(1000)
    for step in range(201):
        pace.at(step, 10.0 * step)
    for step in range(201, 801):
        pace.at(step, 2000.0 + (step - 200))
    left = pace.left(800)
    assert left is not None and 200.0 < left < 210.0  # steps of 1 s; the mean of all would say 650 s
    assert pace.left(1000) is None


def test_the_time_left_is_not_told_before_it_is_known() -> None:
    pace = Pace(1000)
    pace.at(7, 0.0)
    assert pace.left(7) is None
    pace.at(8, 60.0)
    assert pace.left(8) is None
    pace.at(9, 61.0)
    assert pace.left(9) == 991.0
