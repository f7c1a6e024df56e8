"""Text from a network: greedy or sampled, with a cache of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corpora.errors import InputError
from corpora.tokenizer import Tokenizer
from models.decoder import Cache, Decoder


@dataclass(frozen=True)
class Sampling:
    """Draw from the smallest set of ids that has `top_p` of the probability, at a temperature."""

    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Written:
    """What a network wrote after a prompt.

    ids: the new ids, without the EOS that ended them
    ended: it wrote EOS, and was not cut at the limit
    """

    text: str
    ids: list[int]
    ended: bool


def write(
    decoder: Decoder, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling | None = None
) -> Written:
    """Continue a prompt, greedily without `sampling`.

    The prompt is taken as the beginning of a document, and so comes after what stands before one in the
    blocks: the EOS of another document and its own BOS, as far as the tokenizer has them.  A model trained with
    document masks has seen nothing before a BOS.
    """
    text_ids = [int(i) for i in tokenizer.encode(prompt)]
    head = [special for special in (tokenizer.eos, tokenizer.bos) if special is not None]
    if decoder.document_mask:
        head = head[-1:]
    if not head and not text_ids:
        raise InputError(
            "an empty prompt needs a BOS or EOS id, and the recipe's [tokenizer] has neither; write a prompt"
        )
    ids, ended = continue_ids(
        decoder,
        head + text_ids,
        max_new_tokens,
        stop=tokenizer.eos,
        ids_known=tokenizer.vocab_size,
        sampling=sampling,
    )
    # Decoded behind the prompt: SentencePiece drops the space of a text's first piece.
    before, whole = tokenizer.decode(text_ids), tokenizer.decode(text_ids + ids)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)
    return Written(text, ids, ended)


@torch.no_grad()
def continue_ids(
    decoder: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    stop: int | None,
    ids_known: int,
    sampling: Sampling | None = None,
    use_cache: bool = True,
) -> tuple[list[int], bool]:
    """Return the ids that follow `prompt`, and whether `stop` ended them (it is not among them).

    Ids from `ids_known` on are rows of the embedding that the tokenizer has no text for: never chosen.  When
    the context is full, the network goes on from its newer half; so a prompt may be longer than the context,
    and of a long prompt the tail counts.
    """
    device = decoder.embedding.weight.device
    context = decoder.settings.context
    generator = torch.Generator().manual_seed(sampling.seed) if sampling else None
    ids = list(prompt)
    start = 0
    if len(ids) > context:
        start = len(ids) - max(context // 2, context - max_new_tokens)
    cache = Cache(context)
    while len(ids) < len(prompt) + max_new_tokens:
        if len(ids) - start > context:
            start, cache = len(ids) - context // 2, Cache(context)
        if use_cache:
            hidden_BTD = decoder.hidden(torch.tensor([ids[start + cache.length :]], device=device), cache)
        else:
            hidden_BTD = decoder.hidden(torch.tensor([ids[start:]], device=device))
        logits_V = decoder.logits(hidden_BTD[0, -1])[:ids_known].cpu()
        if not torch.isfinite(logits_V).all():
            raise InputError(
                f"the logits of new token {len(ids) - len(prompt) + 1} are not finite; the checkpoint is spoilt, train again"
            )
        choice = int(logits_V.argmax()) if sampling is None else draw(logits_V, sampling, generator)
        if choice == stop:
            return ids[len(prompt) :], True
        ids.append(choice)
    return ids[len(prompt) :], False


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """Draw an id.  On the CPU whatever the model's device, so that a seed means the same everywhere."""
    probabilities, order = (logits_V / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.where(before < sampling.top_p, 0.0)  # the likeliest id is always kept
    return int(order[torch.multinomial(kept, 1, generator=generator)])
