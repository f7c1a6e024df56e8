"""The output head and cross-entropy in one, a chunk of rows at a time: logits [N, V] never exist.

Shape suffixes:  N targets   C those of a chunk   D width   V vocabulary

The gradient of a cross-entropy by its logits is softmax minus one-hot.  So `forward` turns each chunk of logits
into that, in the one buffer that all chunks share, and has both the loss and the gradients from one look at them;
`backward` only hands the gradients out.  (The same idea: Liger-Kernel, arXiv 2410.10989.  Torch's own
linear_cross_entropy is newer than the oldest torch that we run on, and slower on a CPU.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that is padding
CHUNK = 512  # rows of logits that exist at a time: on a CPU fewer and more are slower, with 8k and with 50k logits
CUDA_CHUNK = 4096


def sum_of_nats(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Tensor:
    """Return the loss summed over the targets that are not IGNORED: a float32 scalar, differentiable once.

    Products are made in `dtype`; gradients and the loss are summed in float32.  In bfloat16 a single target's loss
    is off by some hundredths either way, and the mean of a thousand is good to four digits.  A target whose
    probability is below 1e-38 counts 87.3 nats, not infinitely many (its gradient is exact); NaN stays NaN.
    """
    chunk = chunk or chunk_rows(hidden_ND)
    if not torch.is_grad_enabled():
        return nats(hidden_ND, weight_VD, bias_V, targets_N, dtype, chunk).sum()
    loss: Tensor = _Head.apply(hidden_ND, weight_VD, bias_V, targets_N, dtype, chunk)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def nats(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Tensor:
    """Return the loss of every target [N] in float32, 0 where it is IGNORED; without gradients, for evaluation.

    Logits are made in `dtype`, everything after them in float32.
    """
    hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    real_N = targets_N != IGNORED
    at_N1 = targets_N.where(real_N, 0)[:, None]
    losses_N = torch.zeros(len(targets_N), dtype=_sums(dtype), device=hidden_ND.device)
    size = max(1, (chunk or chunk_rows(hidden_ND)) // 2)  # beside the logits there is their log-softmax
    for start in range(0, len(targets_N), size):
        rows = slice(start, start + size)
        logits_CV = F.linear(hidden_ND[rows], weight_VD, bias_V)
        log_p_CV = logits_CV.log_softmax(-1, dtype=losses_N.dtype)
        losses_N[rows] = -log_p_CV.gather(1, at_N1[rows]).squeeze(1)
    return losses_N.where(real_N, 0.0)


def chunk_rows(tensor: Tensor) -> int:
    """Return how many rows of logits should exist at a time on a tensor's device."""
    return CUDA_CHUNK if tensor.is_cuda else CHUNK


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        dtype: torch.dtype,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        (N, D), V, here = hidden_ND.shape, len(weight_VD), hidden_ND.device
        h_ND, w_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        b_V = None if bias_V is None else bias_V.to(dtype)
        real_N = targets_N != IGNORED
        at_N = targets_N.where(real_N, 0)
        # Rows of IGNORED targets: left out of the weight's gradient here, and of the hidden states' below.
        kept_ND = h_ND.where(real_N[:, None], 0)
        kept_1N = real_N.to(dtype)[None]

        d_hidden = torch.empty(N, D, dtype=hidden_ND.dtype, device=here) if wants_hidden else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros(V, dtype=_sums(dtype), device=here) if wants_bias else None
        p_target_N = torch.empty(N, dtype=_sums(dtype), device=here)
        buffer = torch.empty(min(chunk, N), V, dtype=dtype, device=here)
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            p_CV = buffer[: rows.stop - start]
            if b_V is None:
                torch.mm(h_ND[rows], w_VD.t(), out=p_CV)
            else:
                torch.addmm(b_V, h_ND[rows], w_VD.t(), out=p_CV)
            torch.softmax(p_CV, -1, out=p_CV)  # in place: each row is read to its end before it is written
            at = torch.arange(len(p_CV), device=here), at_N[rows]
            p_target_N[rows] = p_CV[at]
            # From here on it is the gradient by the logits.  (scatter_ would copy all of a bf16 tensor.)
            p_CV[at] -= 1
            if d_hidden is not None:
                d_hidden[rows] = p_CV @ w_VD
            if wants_weight and d_weight is None:
                d_weight = (p_CV.t() @ kept_ND[rows]).to(_sums(dtype))
            elif d_weight is not None and d_weight.dtype == dtype:
                d_weight.addmm_(p_CV.t(), kept_ND[rows])
            elif d_weight is not None:
                d_weight += p_CV.t() @ kept_ND[rows]
            if d_bias is not None:
                d_bias += (kept_1N[:, rows] @ p_CV)[0]
        if d_hidden is not None:
            d_hidden.masked_fill_(~real_N[:, None], 0)
        if d_weight is not None:
            d_weight = d_weight.to(weight_VD.dtype)
        if d_bias is not None and bias_V is not None:
            d_bias = d_bias.to(bias_V.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        losses_N = -p_target_N.clamp(min=torch.finfo(torch.float32).tiny).log()
        return losses_N.where(real_N, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        # On a CPU a look is free, and spares a pass over V x D numbers.
        if factor.is_cuda or factor != 1:
            gradients = [None if gradient is None else gradient * factor for gradient in gradients]
        return *gradients, None, None, None
