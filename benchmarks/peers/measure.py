"""Run a command and write what it took:  python -I -S measure.py RESULT.json OUT ERR COMMAND...

A process of its own, and a small one: a child begins with its parent's peak memory, so the parent must have
none to speak of.  Linux adopts orphans here (datatrove's workers are children of a fork server that nobody
waits for), so the CPU seconds are those of every process of the tree.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
INTERVAL = 0.2


def main() -> None:
    result, out, err, *command = sys.argv[1:]
    adopts = _adopt_orphans()
    with Path(out).open("wb") as stdout, Path(err).open("wb") as stderr:
        start = time.perf_counter()
        # A session of its own tells the tree's processes from all others.
        child = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        peak, ended = [0], threading.Event()
        sampler = threading.Thread(target=_sample, args=(child.pid, peak, ended))
        sampler.start()
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
    usages = [used]
    try:
        while adopts:
            usages.append(os.wait4(-1, 0)[2])
    except ChildProcessError:
        pass
    ended.set()
    sampler.join()
    unit = 1 if sys.platform == "darwin" else 1024
    told = {
        "code": os.waitstatus_to_exitcode(status),
        "wall": wall,
        "cpu": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        "largest": max(usage.ru_maxrss for usage in usages) * unit,
        "tree": peak[0],
    }
    Path(result).write_text(json.dumps(told))


def _adopt_orphans() -> bool:
    if sys.platform != "linux":
        return False
    import ctypes

    return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def _sample(session: int, peak: "list[int]", ended: threading.Event) -> None:
    """Keep the largest sum of the tree's proportional shares of memory; 0 where the system has no /proc."""
    while not ended.wait(INTERVAL):
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                # After the name, which may hold spaces: state, parent, group, session.
                if int(stat.read_text().rpartition(")")[2].split()[3]) != session:
                    continue
                lines = (stat.parent / "smaps_rollup").read_text().splitlines()
            except (OSError, IndexError):
                continue  # it ended just now
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        peak[0] = max(peak[0], total)


if __name__ == "__main__":
    main()
