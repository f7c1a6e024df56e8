"""The tutorial's recipe for so many CPU-seconds:  tutorial.py '{"shape": ..., "seconds": 300}' IDS.npy WEIGHTS

As it stands in FareedKhan-dev/train-llm-from-scratch: PyTorch's own initial weights, windows of 16 ids though
the model has 128 positions, 32 of them in a step, AdamW with a learning rate of 0.0005 (which falls only at
step 50,000) and PyTorch's other defaults, float32, no clipping.  Its attention is a fused one here, which is faster.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from plain_loop import Plain
from safetensors.torch import save_model

WINDOW, BATCH, LR = 16, 32, 5e-4


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.manual_seed(1)
    model = Plain(spec["shape"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    ids = torch.from_numpy(np.load(sys.argv[2]).astype(np.int64))
    starts = torch.arange(0, len(ids) - WINDOW, WINDOW)
    step, begun = 0, time.process_time()
    while (took := time.process_time() - begun) < spec["seconds"]:
        first = starts[torch.randint(len(starts), (BATCH,))]
        rows = ids[first[:, None] + torch.arange(WINDOW + 1)]
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    save_model(model, sys.argv[3])
    print(json.dumps({"steps": step, "tokens": step * BATCH * WINDOW, "cpu": took}))


if __name__ == "__main__":
    main()
