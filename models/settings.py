"""The model half of a recipe: the decoder's shape, its training, its evaluation and its smoke test."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from corpora.settings import DataSettings, Strict, parse, read_toml, recipe_path


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


class Train(Strict):
    """[train] The loop.  A step is one optimizer update."""

    seed: int = Field(default=1, ge=0, description="of the initial weights and of the order of blocks")
    steps: int = Field(ge=1, description="optimizer updates")
    batch: int = Field(ge=1, description="blocks in a step, over all processes and micro-batches")
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="blocks in one forward pass of one process; default: batch / processes",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: Muon for hidden matrices, AdamW for the rest",
    )
    lr: float = Field(gt=0, description="peak learning rate")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    decay: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the steps, at the end, in which lr falls linearly to min_lr",
    )
    min_lr: float = Field(default=0.0, ge=0, le=1, description="final learning rate as a share of lr")
    weight_decay: float = Field(
        default=0.1, ge=0, description="on matrices; never on norms, biases and embeddings"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW: memory of the gradient")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="of AdamW: memory of its square")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    dtype: Literal["fp32", "bf16", "auto"] = Field(
        default="fp32",
        description="bf16: autocast for matrix products, weights stay fp32; "
        "auto: bf16 on a device that has instructions for it, else fp32",
    )
    log_every: int = Field(default=10, ge=1, description="steps between two lines of metrics.jsonl")
    eval_every: int = Field(default=100, ge=1, description="steps between two held-out losses")
    eval_blocks: int = Field(
        default=64,
        ge=1,
        description="held-out blocks that the loss in training is measured on, evenly spread",
    )
    save_every: int = Field(default=500, ge=1, description="steps between two checkpoints")
    keep: int = Field(default=2, ge=2, description="checkpoints kept; the older ones are removed")


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

    @classmethod
    def read(cls, recipe: str | Path) -> Self:
        """Read all tables of a recipe, given by name or path."""
        path = recipe_path(recipe)
        tables = read_toml(path)
        return parse(cls, {key: tables[key] for key in RunSettings.model_fields if key in tables}, path)
