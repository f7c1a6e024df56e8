"""Whole tensors and a process's share of them: FSDP2 keeps each parameter as a DTensor, cut by rows.

DTensor is asked for by what it can do: its module takes half a second to import, which only FSDP2 needs.
"""

from typing import Any

from torch import Tensor


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor; of a DTensor every process must ask, since they exchange their shares."""
    all_of_it: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return all_of_it


def share(tensor: Tensor, like: Any) -> Tensor:
    """Return a tensor that every process has as `like` is held: its own rows of it, or all of it."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    # Nothing is sent: every process takes its rows of what it has.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def number(tensor: Tensor) -> float:
    """Return the value of a tensor with one element."""
    return float(whole(tensor))
