"""What training a recipe will cost on a GPU, before anything starts."""

from models.decoder import count_parameters
from models.settings import RunSettings

# Dense bf16 products per second, of the makers' data sheets.
PEAK = {"H100": 989e12, "A100": 312e12, "RTX 4090": 165e12}
SHARE = 0.4  # of the peak that a good training loop reaches on models of 1B and more; small ones stay below


def tokens(settings: RunSettings) -> int:
    """Return how many tokens the recipe trains on."""
    return settings.train.steps * settings.train.batch * (settings.blocks.length - 1)


def flops_per_token(settings: RunSettings) -> int:
    """Return the floating-point operations of a training step for each token: 6 N + 12 layers x width x length.

    N counts what is multiplied with, so an input table of its own does not count (PaLM, appendix B).
    """
    model = settings.model
    tables = 0 if model.tie else model.vocab * model.width
    if model.positions == "learned":
        tables += model.context * model.width
    return 6 * (count_parameters(model) - tables) + 12 * model.layers * model.width * settings.blocks.length


def estimate(settings: RunSettings) -> str:
    """Return the estimate as lines of text."""
    total = tokens(settings) * flops_per_token(settings)
    hours = ", ".join(f"{name} {total / (peak * SHARE) / 3600:,.2f}" for name, peak in PEAK.items())
    return (
        f"model      {count_parameters(settings.model):,} parameters, trained on {tokens(settings):,} tokens "
        f"({total:.2e} operations)\n"
        f"GPU hours  {hours} (one GPU at {SHARE:.0%} of its bf16 peak)"
    )
