"""Make the run folder: from here on the recipe as run lies on disk."""

import logging
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from corpora import demo, files, tokenizer
from corpora.errors import InputError
from models import runs
from models.settings import RunSettings

log = logging.getLogger(__name__)


@task(task_run_name="begin {name}", cache_policy=NO_CACHE)
def begin(name: str, settings: RunSettings, toml: str) -> Path:
    """Check what can be known before the work, and return the run's folder.

    The folder's name binds the recipe to the hashes of its shards, so a rebuilt corpus gets another run.
    """
    data, corpus = files.data_root(), settings.corpus
    if corpus.name == "demo" and corpus.lock is None:
        demo.build(data)
    vocabulary = tokenizer.load(settings.tokenizer).vocab_size
    if vocabulary > settings.model.vocab:
        raise InputError(
            f"recipe {name}: the tokenizer has {vocabulary} ids, but model.vocab is {settings.model.vocab}; "
            f"set model.vocab to at least {vocabulary}"
        )
    run = runs.create(name, toml, runs.inputs_of(corpus, data), runs.runs_root())
    log.info("run folder %s", run)
    return run
