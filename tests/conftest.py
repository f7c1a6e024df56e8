"""Fixtures that several rooms use."""

import signal
from pathlib import Path

import pytest

from corpora import demo

# A shell that put the tests into the background had them ignore Ctrl-C, and every process inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data root with the whole demo corpus built in it (a few seconds, once); leave it as it is."""
    data = tmp_path_factory.mktemp("data")
    demo.build(data)
    return data
