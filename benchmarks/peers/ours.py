"""Our own training step under the same clock:  ours.py '{"shape": ..., "optimizer": "muon", ...}'

models.step.Stepper, as models.train drives it: normalised loss, finite check, clipping, all in a step.  It runs
on the project's own Python, not in the peers' environment.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a plain checkout

import torch
from turns import Turns, random_ids

from models import device
from models.data import Batch
from models.processes import Processes
from models.settings import Model, Train
from models.step import Stepper

LR = 1e-3


def main() -> None:
    spec = json.loads(sys.argv[1])
    model = Model(**spec["shape"])
    train = Train(steps=1_000_000, batch=spec["rows"], lr=LR, optimizer=spec["optimizer"])
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    stepper = Stepper(model, train, Processes(0, 1, device.choose("cpu")), dtype=dtype)
    stepper.init(1)
    parameters = sum(p.numel() for p in stepper.decoder.parameters())
    turns = Turns(spec)
    ids = random_ids(spec, 8 * spec["rows"]).split(spec["rows"])
    step, more = 0, True
    while more:
        batch = ids[step % len(ids)]
        # Targets are a copy, as models.data makes them to mark padding.
        update = stepper.update([Batch(batch[:, :-1], batch[:, 1:].clone(), None)], LR)
        assert update.bad is None, update.bad
        step += 1
        more = turns.more(parameters=parameters, loss=update.loss, torch=torch.__version__)


if __name__ == "__main__":
    main()
