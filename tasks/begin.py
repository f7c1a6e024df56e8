"""Before the work: what can be known without it, and the run folder, where the recipe as run lies."""

import logging
import tempfile
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from corpora import demo, estimate, files, lock, tokenizer
from corpora.errors import InputError
from models import runs
from models.settings import RunSettings
from tasks import child

log = logging.getLogger(__name__)


@task(task_run_name="check {name}", cache_policy=NO_CACHE)
def check(
    name: str,
    settings: RunSettings,
    toml: str,
    device: str = "auto",
    processes: int = 1,
    allow_cpu: bool = False,
) -> list[str]:
    """Check vocabulary, memory, time, lock and disk, before anything is downloaded.

    Return the shards whose sha256 only their first download can tell.
    """
    data, corpus = files.data_root(), settings.corpus
    if corpus.name == "demo" and corpus.lock is None:
        demo.build(data)
    trained = settings.tokenizer.train
    vocabulary = trained.vocab if trained else tokenizer.load(settings.tokenizer).vocab_size
    if vocabulary > settings.model.vocab:
        raise InputError(
            f"recipe {name}: the tokenizer has {vocabulary} ids, but model.vocab is {settings.model.vocab}; "
            f"set model.vocab to at least {vocabulary}"
        )
    log.info("what training takes here:\n%s", preflight(name, toml, device, processes, allow_cpu))
    known = lock.load_lock(corpus, data)
    found = estimate.estimate(settings, data)
    estimate.check_space(found, data, prepare=True)
    log.info(
        "%d shards: %s bytes to download, about %s for blocks, %s are free",
        len(found.shards),
        f"{found.download:,}",
        f"{found.blocks:,}",
        f"{estimate.free_bytes(data):,}",
    )
    return [shard for shard in corpus.shards if known.entry(shard).sha256 is None]


@task(task_run_name="begin {name}", cache_policy=NO_CACHE)
def begin(name: str, settings: RunSettings, toml: str) -> Path:
    """Make the run folder and return it.

    Its name binds the recipe to the hashes of its shards, so a rebuilt corpus gets another run.
    """
    run = runs.create(name, toml, runs.inputs_of(settings.corpus, files.data_root()), runs.runs_root())
    log.info("run folder %s", run)
    return run


def preflight(name: str, toml: str, device: str, processes: int, allow_cpu: bool) -> str:
    """Return the table of memory and time that training takes on this machine; refuse what it has not.

    In a child process, since torch would take two seconds and 300 MB of Prefect's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / f"{name}.toml"
        recipe.write_text(toml, "utf-8")
        command = child.python(
            "models", "estimate", recipe, "--device", device, "--processes", str(processes), "--events"
        )
        if allow_cpu:
            command.append("--allow-cpu")
        return str(child.run(command)["text"])
