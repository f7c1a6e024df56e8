"""Several processes of this machine that train together: the agent of torchrun, with our exit codes and no more words."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from corpora.parallel import cores
from models.device import MOST_THREADS


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m models ARGUMENTS` so many times at once, each with a rank; return the exit code.

    It is 0 when all ended well, else that of the one that failed first, as a shell would say it.  A signal is
    passed on, and waited for.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    logging.disable(logging.ERROR)  # the processes say themselves what is wrong, in a line instead of a table
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(cores() // processes, MOST_THREADS))))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a port that is free
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        launch_agent(config, sys.executable, ["-m", "models", *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} of {processes} was killed by {name}", file=sys.stderr, flush=True)
        return 128 - failure.exitcode
    except SignalException as asked:
        return 128 + asked.sigval
    return 0
