"""What ends a training run before its time, on a real server: a cancel, a kill, a server that dies."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deployments.serve import settings

sys.path.append(str(Path(__file__).parent))

from tiny_corpus import make_corpus, make_recipe

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def long(checkout: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe that trains for some ten seconds and saves every second or two."""
    folder = tmp_path_factory.mktemp("long")
    lock = make_corpus(
        folder / "long-corpus", {"train/00": range(40), "train/01": range(40, 80), "val": range(80, 86)}
    )
    # A text that is known by heart gives gradients that are tiny but for the odd step: nothing to skip or undo.
    train = "steps = 500\nsave_every = 50\nlog_every = 10\neval_every = 250\nspikes = {factor = 0}"
    yield make_recipe(folder / "long.toml", lock, train)
    shutil.rmtree(checkout.root / "runs")  # the tests that come later know their own runs only


def checkpoints(folder: Path) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def steps(folder: Path) -> list[int]:
    """Return the steps of a run's metrics."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def trainers(folder: Path) -> list[int]:
    """Return the processes that train a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "train" in words and str(folder) in words:
            found.append(int(process.parent.name))
    return found


def begun(served: Any, name: str, step: int) -> Path:
    """Wait until the newest run of a recipe has trained so far; return its folder."""

    def far_enough() -> list[Path]:
        return [one for one in (served.root / "runs").glob(f"{name}-*") if max(steps(one), default=0) >= step]

    found: list[Path] = served.wait_for(f"step {step} of {name}", far_enough, 400)
    return found[0]


def test_a_cancel_saves_and_the_next_run_goes_on(served: Any, long: Path) -> None:
    run = served.start_by_worker(long)
    folder = begun(served, "long", 60)
    served.api(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"}, force=True)
    served.wait_for("Cancelled", lambda: served.state(run) in ("Cancelled", "Crashed", "Failed"), 150)
    assert served.state(run) == "Cancelled"
    assert trainers(folder) == []
    saved = checkpoints(folder)[-1]
    assert 60 <= saved < 500 and saved % 50 != 0  # saved because of the cancel, where that found it

    again = served.start_by_worker(long)
    served.wait_for("Completed", lambda: served.state(again) in ("Completed", "Crashed", "Failed"), 300)
    log = served.flow_log(again)
    assert served.state(again) == "Completed", log
    assert re.search(rf"going on from \S+/step-{saved:07}", log)
    assert checkpoints(folder)[-1] == 500
    seen = steps(folder)
    assert seen == sorted(set(seen))  # the lines of the second run follow those of the first


def test_a_killed_run_that_is_retried_in_the_ui_goes_on_at_its_checkpoint(served: Any, long: Path) -> None:
    recipe = long.with_name("killed.toml")
    recipe.write_text(long.read_text().replace("lr = 0.01", "lr = 0.011"))
    run = served.start_by_worker(recipe)
    folder = begun(served, "killed", 60)
    (trainer,) = trainers(folder)
    flow = int(Path(f"/proc/{trainer}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(flow, signal.SIGKILL)
    served.wait_for("Crashed", lambda: served.state(run) == "Crashed", 150)
    served.wait_for("the trainer's end", lambda: not trainers(folder), 60)
    assert max(checkpoints(folder)) >= 50

    def running() -> bool:
        # The runner reports a crash at once and the worker once more two seconds later, which undoes a retry
        # that was asked for in between; a person who sees that presses the button again.
        if served.state(run) == "Crashed":
            retry = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
            served.api(f"flow_runs/{run}/set_state", state=retry, force=True)
        return bool(served.state(run) == "Running")

    served.wait_for("Running", running, 150)
    # The slot `gpu` of the killed process is free when its lease of a minute has ended.
    served.wait_for("Completed", lambda: served.state(run) in ("Completed", "Failed"), 400)
    log = served.flow_log(run)
    assert served.state(run) == "Completed", log
    found = re.findall(r"going on from \S+/step-(\d+)", log)
    assert len(found) == 1 and int(found[0]) >= 50
    assert checkpoints(folder)[-1] == 500


class Server:
    """A Prefect server of its own, which can be killed and started again over the same database."""

    def __init__(self, checkout: Any, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        own = {**settings(url, "127.0.0.1", port), **checkout.environment}
        own |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": str(port)}
        # The test asks without a token.
        own |= {"PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "false"}
        self.checkout = checkout._replace(environment=own)
        self.url, self.log = f"{url}/api", home.with_name("server.log")

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "server", "start"],
                cwd=self.checkout.root,
                env=self.checkout.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.checkout.wait_for("the server", self.answers, 200, self.process)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def ask(self, path: str) -> Any:
        request = urllib.request.Request(f"{self.url}/{path}", b"{}", {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(checkout: Any, tmp_path: Path) -> Iterator[Server]:
    server = Server(checkout, tmp_path / "prefect")
    try:
        server.start()
        yield server
    finally:
        server.kill()


def test_training_outlives_the_server(server: Server, checkout: Any, long: Path, tmp_path: Path) -> None:
    made = server.checkout.run("prefect", "gcl", "create", "gpu", "--limit", "1")
    assert made.returncode == 0, made.stderr
    recipe, log = long.with_name("away.toml"), tmp_path / "flow.log"
    recipe.write_text(
        long.read_text().replace("steps = 500", "steps = 700").replace("every = 10", "every = 1")
    )
    flow = server.checkout.start("flows.pretrain", str(recipe), log=log)
    folder = begun(checkout, "away", 60)
    server.kill()
    before = steps(folder)[-1]
    # More lines than a pipe holds that nobody reads: 64 KB of some 250 bytes each.
    checkout.wait_for("300 lines without a server", lambda: steps(folder)[-1] > before + 300, 300, flow)
    assert not server.answers() and steps(folder)[-1] < 700
    server.start()
    assert flow.wait(200) == 0, log.read_text()
    assert " after 700 steps (watched blocks); " in log.read_text()
    (run,) = server.ask("flow_runs/filter")
    assert run["state_name"] == "Completed"
    # Its lease outlived the server, so the slot is free for the next run.
    slots = {one["name"]: one["active_slots"] for one in server.ask("v2/concurrency_limits/filter")}
    assert slots["gpu"] == 0


STAND_IN = """
import sys, time
from pathlib import Path
from prefect import flow
from tasks import child
from tasks.train import train

log = Path(sys.argv[1])
body = f'''
import json, time
log = open({str(log)!r}, "a")
print(time.time(), "begin", file=log, flush=True)
time.sleep(3)
print(time.time(), "end", file=log, flush=True)
print(json.dumps({{"event": "result", "skipped": False, "step": 1}}))
'''
child.python = lambda *_: [sys.executable, "-c", body]

@flow
def alone() -> None:
    with log.open("a") as file:
        file.write(f"{time.time()} ask\\n")
    train(log.parent, "cpu")

alone()
"""


def test_one_training_at_a_time(served: Any, tmp_path: Path) -> None:
    log = tmp_path / "times"
    script = served.root / "alone.py"
    script.write_text(STAND_IN)
    environment = {**served.environment, "PREFECT_API_URL": served.address()}
    both = [
        subprocess.Popen([sys.executable, "-m", "alone", str(log)], cwd=served.root, env=environment)
        for _ in range(2)
    ]
    try:
        assert [one.wait(240) for one in both] == [0, 0]
    finally:
        for one in both:
            one.kill()
            one.wait()
    told = sorted((float(line.split()[0]), line.split()[1]) for line in log.read_text().splitlines())
    what = [word for _, word in told if word != "ask"]
    assert what == ["begin", "end", "begin", "end"]
    asked = [moment for moment, word in told if word == "ask"]
    first_end = next(moment for moment, word in told if word == "end")
    assert max(asked) < first_end  # the second waited: it was there before the first had ended
