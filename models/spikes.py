"""When a step must not update the weights: its loss or gradient is no number, or the gradient is far too large."""

import math
from collections.abc import Iterable

from models.settings import Spikes

WINDOW = 64  # good steps whose gradient norms are remembered
FEWEST = 16  # below, nothing is known of what is usual


class Watch:
    """The gradient norms of the last good steps, and the judgement of the next one."""

    def __init__(self, settings: Spikes, norms: Iterable[float] = ()) -> None:
        self.settings = settings
        self.norms = list(norms)[-WINDOW:]

    def judge(self, loss: float, norm: float) -> str | None:
        """Say what is wrong with a step, or None; a good step's norm is remembered."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss:.6g}, the gradient norm {norm:.6g}"
        if self.settings.factor and len(self.norms) >= FEWEST:
            ordered = sorted(self.norms)
            usual = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
            if norm > self.settings.factor * usual:
                return f"the gradient norm is {norm:.6g}, more than {self.settings.factor:g} times the usual {usual:.6g}"
        self.norms = [*self.norms, norm][-WINDOW:]
        return None
