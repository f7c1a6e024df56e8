"""The clock of training loops that take turns: each a process that steps when its standard input says so.

A loop calls `Turns.more` after every update.  After the warm-up it says that it is ready; then each line that
it reads makes it do `steps` updates and tell what they took.  Start-up and compilation are so counted for
nobody, and what a busy machine costs is shared by all.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Turns:
    """Counts updates, and measures those of a turn."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.steps, self.left = spec["steps"], spec["warm"]
        self.cuda = spec.get("device") == "cuda"
        self.cpu = self.wall = 0.0
        # What a library prints goes to standard error: our lines must stand alone.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def more(self, **about: Any) -> bool:
        """Count an update; at the end of a turn wait for the next.  False: there is none, leave.

        What is given here is told at the end of the warm-up.
        """
        self.left -= 1
        if self.left > 0:
            return True
        if self.cuda:
            torch.cuda.synchronize()
            about["memory"] = torch.cuda.max_memory_allocated()
        if self.wall:
            cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
            about |= {"cpu": cpu, "wall": wall, "steps": self.steps}
        print(json.dumps(about), file=self.out, flush=True)
        if not sys.stdin.readline():
            return False
        self.left = self.steps
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        return True


def random_ids(spec: dict[str, Any], rows: int) -> Tensor:
    """Return the ids that every contestant trains on, [rows, length + 1]."""
    drawn = np.random.default_rng(1).integers(0, spec["shape"]["vocab"], (rows, spec["length"] + 1))
    return torch.from_numpy(drawn)
