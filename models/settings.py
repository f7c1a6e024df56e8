"""The model half of a recipe: the decoder's shape, its training, its evaluation and its smoke test."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from corpora.settings import DataSettings, Strict, parse, read_toml, recipe_path

Parallel = Literal["none", "ddp", "fsdp"]  # how the weights lie on the processes that train together


class Model(Strict):
    """[model] One decoder; GPT and LLaMA are two choices of the same fields."""

    norm: Literal["layernorm", "rmsnorm"] = Field(description="layernorm: GPT; rmsnorm: LLaMA")
    positions: Literal["learned", "rope"] = Field(description="learned table, or rotary embedding")
    mlp: Literal["relu", "gelu", "swiglu"] = Field(description="feed-forward activation")
    layers: int = Field(ge=1, description="decoder blocks")
    width: int = Field(ge=1, description="residual stream, in channels")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int | None = Field(
        default=None, ge=1, description="key/value heads (grouped-query attention); default: heads"
    )
    ffn: int = Field(ge=1, description="hidden channels of the feed-forward network")
    vocab: int = Field(ge=2, description="rows of the embedding; at least the tokenizer's vocabulary")
    context: int = Field(ge=2, description="longest sequence, in tokens")
    tie: bool = Field(default=True, description="the output head is the embedding, transposed")
    bias: bool = Field(
        default=False, description="biases in the projections other than q, k, v, and in LayerNorm"
    )
    head_bias: bool = Field(
        default=False,
        description="a bias in the output head (as in the tutorial's GPT); untied heads only",
    )
    rope_theta: float = Field(default=10_000.0, gt=0, description="base of the rotary frequencies")
    qk_norm: bool = Field(default=False, description="RMSNorm of each head's query and key, before RoPE")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.positions == "rope" and (self.width // self.heads) % 2:
            raise ValueError(f"rope needs an even head size (got {self.width // self.heads})")
        if self.tie and self.head_bias:
            raise ValueError("head_bias needs tie = false")
        return self


class Spikes(Strict):
    """[train.spikes] What to do about a step whose loss or gradient is not finite, or whose gradient is too large."""

    factor: float = Field(
        default=10.0,
        ge=0,
        description="a gradient norm above so many times the median of the last 64 is a spike; 0: only what is not "
        "finite is",
    )
    skip: int = Field(
        default=3, ge=0, description="such steps in a row that are passed over; the next one is a roll-back"
    )
    roll_back: int = Field(
        default=2,
        ge=0,
        description="how often the run may go back to its last checkpoint and on with other blocks, before it fails",
    )


class Train(Strict):
    """[train] The loop.  A step is one optimizer update."""

    seed: int = Field(default=1, ge=0, description="of the initial weights and of the order of blocks")
    steps: int | None = Field(default=None, ge=1, description="optimizer updates; or say `tokens`")
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="budget: as many steps as come nearest to so many tokens; or say `steps`",
    )
    batch: int = Field(ge=1, description="blocks in a step, over all processes and micro-batches")
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="blocks in one forward pass of one process; default: batch / processes",
    )
    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        default="adamw",
        description="adamw8bit: its moments in 8 bits (bitsandbytes); "
        "muon: Muon for hidden matrices, AdamW for the rest",
    )
    lr: float = Field(gt=0, description="peak learning rate")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    schedule: Literal["wsd", "cosine"] = Field(
        default="wsd",
        description="wsd: warm-up, constant, linear decay; cosine: warm-up, then half a cosine to the end",
    )
    decay: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="of wsd: share of the steps, at the end, in which lr falls linearly to min_lr",
    )
    min_lr: float = Field(default=0.0, ge=0, le=1, description="final learning rate as a share of lr")
    weight_decay: float = Field(
        default=0.1, ge=0, description="on matrices; never on norms, biases and embeddings"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW: memory of the gradient")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="of AdamW: memory of its square")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    spikes: Spikes = Field(default=Spikes(), description="what to do about a bad step")
    dtype: Literal["fp32", "bf16", "auto"] = Field(
        default="fp32",
        description="bf16: autocast for matrix products, weights stay fp32; "
        "auto: bf16 on a device that has instructions for it, else fp32",
    )
    document_mask: bool = Field(
        default=False, description="a token sees only its own document, not what else is in the block"
    )
    reset_positions: bool = Field(default=False, description="positions count from each document's beginning")
    activation_checkpointing: bool = Field(
        default=False, description="compute a block's activations again in the backward pass: less memory"
    )
    compile: bool | Literal["auto"] = Field(
        default="auto", description="torch.compile; auto: on CUDA (on a CPU it pays after some ten minutes)"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="several processes: ddp, each with all weights; fsdp, each with its share of them; "
        "auto: ddp where it fits",
    )
    deterministic: bool = Field(
        default=False, description="only algorithms that give the same bits each time (CUDA: slower)"
    )
    log_every: int = Field(default=10, ge=1, description="steps between two lines of metrics.jsonl")
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), description="where the lines of metrics.jsonl go as well"
    )
    eval_every: int = Field(default=100, ge=1, description="steps between two held-out losses")
    eval_blocks: int = Field(
        default=64,
        ge=1,
        description="held-out blocks that the loss in training is measured on, evenly spread",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="end early after so many held-out losses in a row that are not the best so far; default: never",
    )
    save_every: int = Field(default=500, ge=1, description="steps between two checkpoints")
    keep: int = Field(
        default=2, ge=2, description="newest checkpoints kept, beside the best; the others are removed"
    )

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.steps is None and self.tokens is None:
            raise ValueError("say how long: steps, or tokens")
        if self.optimizer == "adamw8bit" and self.parallel == "fsdp":
            raise ValueError(
                "adamw8bit cannot be shared out by fsdp; set optimizer to adamw or muon, or parallel to ddp"
            )
        return self

    @property
    def last_step(self) -> int:
        """The number of steps, once the budget is known in steps."""
        assert self.steps is not None, "RunSettings sets it"
        return self.steps


class Evaluate(Strict):
    """[evaluate] Bits per byte of held-out documents, per subset."""

    bytes: int = Field(
        default=300_000,
        ge=1,
        description="score the first documents of each held-out shard, up to this much text",
    )
    document_chars: int | None = Field(
        default=None,
        ge=1,
        description="score only the beginning of each document, so that more of them are scored; default: all of it",
    )
    batch: int = Field(default=8, ge=1, description="windows in one forward pass")


class Generate(Strict):
    """[generate] The smoke test's samples."""

    prompts: tuple[str, ...] = Field(min_length=1, description="an empty prompt starts from the BOS id")
    max_new_tokens: int = Field(
        default=64, ge=1, description="where a text that does not end by itself is cut"
    )
    temperature: float = Field(
        default=0.8, gt=0, description="of the sampled text; a greedy text is made as well"
    )
    top_p: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="nucleus: the smallest set of ids with this much probability",
    )
    seed: int = Field(default=1, ge=0, description="of the sampled text")


class ModelSettings(Strict):
    """The tables of a recipe that decide the network and what is done with it."""

    model: Model
    train: Train
    evaluate: Evaluate = Evaluate()
    generate: Generate


class RunSettings(DataSettings, ModelSettings):
    """Everything that a child process reads from the recipe in its run folder."""

    @model_validator(mode="after")
    def _budget_in_steps(self) -> Self:
        """Work out `train.steps` from `train.tokens`; a recipe as run has both."""
        train = self.train
        if train.tokens is None:
            return self
        steps = max(1, round(train.tokens / (train.batch * (self.blocks.length - 1))))
        if train.steps not in (None, steps):
            raise ValueError(
                f"train.tokens {train.tokens:,} are {steps:,} steps of {train.batch} blocks, but train.steps is "
                f"{train.steps:,}; leave one of them out"
            )
        object.__setattr__(self, "train", train.model_copy(update={"steps": steps}))  # frozen from here on
        return self

    @classmethod
    def read(cls, recipe: str | Path) -> Self:
        """Read all tables of a recipe, given by name or path."""
        path = recipe_path(recipe)
        tables = read_toml(path)
        return parse(cls, {key: tables[key] for key in RunSettings.model_fields if key in tables}, path)
