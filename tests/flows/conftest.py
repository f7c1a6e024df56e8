"""A copy of the checkout that serves, as `make serve` does, and a tiny corpus to run through it.

The copy keeps the tests out of the developer's own `.env`, `.prefect/`, `data/` and `runs/`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.append(str(Path(__file__).parent))

from tiny_corpus import make_corpus, make_recipe

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("corpora", "deployments", "flows", "models", "tasks")
LIMIT = 150.0  # seconds until the server and the worker must be up, on a busy machine


class Checkout(NamedTuple):
    """A copy of the project, with data and runs of its own."""

    root: Path
    environment: Mapping[str, str]

    def run(self, *arguments: str, timeout: float = 150.0) -> "subprocess.CompletedProcess[str]":
        """Run `python -m ...` as a person would in this folder."""
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str, log: Path) -> "subprocess.Popen[bytes]":
        """Start `python -m ...` and let it run."""
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=self.root,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def address(self) -> str:
        """Return the server's address, from where a second terminal has it."""
        return (self.root / ".env").read_text().rpartition("PREFECT_API_URL=")[2].strip()

    def api(self, path: str, **body: Any) -> Any:
        """Ask the server."""
        address = self.address()
        headers = {"Content-Type": "application/json", "Prefect-Csrf-Client": "tests"}
        with urllib.request.urlopen(f"{address}/csrf-token?client=tests", timeout=30) as response:
            headers["Prefect-Csrf-Token"] = json.load(response)["token"]
        request = urllib.request.Request(f"{address}/{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def wait_for(
        self, what: str, condition: Callable[[], Any], seconds: float, *processes: "subprocess.Popen[bytes]"
    ) -> Any:
        """Wait until `condition()` is true while the processes live; return what it gave."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            value = condition()
            if value:
                return value
            for process in processes:
                assert process.poll() is None, f"{what}: the process ended with {process.returncode}"
            time.sleep(0.2)
        raise AssertionError(f"{what}: not within {seconds:.0f} s")

    def flow_run(self, name: str) -> dict[str, Any]:
        """Return the newest flow run of this name."""
        runs = self.api("flow_runs/filter", flow_runs={"name": {"any_": [name]}}, sort="START_TIME_DESC")
        return dict(runs[0])

    def start_by_worker(self, recipe: Path) -> str:
        """Have the worker run a recipe, as the user interface does; return the flow run's id."""
        (deployment,) = self.api("deployments/filter", deployments={"name": {"any_": ["demo"]}})
        made = self.api(
            f"deployments/{deployment['id']}/create_flow_run",
            parameters={"recipe": str(recipe)},
            state={"type": "SCHEDULED", "message": "Run from the Prefect UI"},
        )
        return str(made["id"])

    def state(self, flow_run: str) -> str:
        """Return the name of a flow run's state."""
        (run,) = self.api("flow_runs/filter", flow_runs={"id": {"any_": [flow_run]}})
        return str(run["state_name"])

    def flow_log(self, flow_run: str) -> str:
        """Return the lines that the user interface shows for a flow run, once the last one has arrived."""
        self.wait_for("the log", lambda: "Finished in state" in self.lines(flow_run)[-400:], 20)
        return self.lines(flow_run)

    def lines(self, flow_run: str) -> str:
        """Return the lines of a flow run that are there by now."""
        logs: list[str] = []
        while True:
            found = self.api(
                "logs/filter",
                logs={"flow_run_id": {"any_": [flow_run]}},
                sort="TIMESTAMP_ASC",
                offset=len(logs),
            )
            logs += [str(one["message"]) for one in found]
            if not found:
                return "\n".join(logs)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    root = tmp_path_factory.mktemp("checkout")
    for room in ROOMS:
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "PYTHON"))}
    own |= {
        "PREFECT_HOME": str(root / ".prefect"),
        "PREFECT_SERVER_API_PORT": str(port),
        "PILELINE_DATA": str(root / "data"),
        "PILELINE_RUNS": str(root / "runs"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "2",
    }
    return Checkout(root, own)


@pytest.fixture(scope="session")
def served(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """The copy with `python -m deployments.serve` up."""
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    process = checkout.start("deployments.serve", log=log)
    try:
        checkout.wait_for("serve", lambda: "Pileline serves" in log.read_text(), LIMIT, process)
        yield checkout
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()}") from None
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert process.returncode == 0, log.read_text()
    assert not (checkout.root / ".env").exists()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over three sound shards, of which one is trusted on first use."""
    folder = tmp_path_factory.mktemp("tiny")
    shards = {"train/00": range(40), "train/01": range(40, 80), "val": range(80, 86)}
    return make_recipe(folder / "tiny.toml", make_corpus(folder / "tiny-corpus", shards, unknown=["val"]))


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of which one shard was cut in the middle."""
    folder = tmp_path_factory.mktemp("half")
    shards = {"train/00": range(40), "train/01": range(40, 80), "val": range(80, 86)}
    return make_recipe(folder / "half.toml", make_corpus(folder / "half-corpus", shards, broken=["train/01"]))
