"""Numbers that lie in parts on several ranks (FSDP2's `DTensor`): made whole to be saved, filled from a file."""

import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of a tensor only."""
    return isinstance(tensor, DTensor)


def is_writer(tensor: Tensor) -> bool:
    """Whether this rank is the one to write a tensor: any that has all of it, else the first."""
    return not is_sharded(tensor) or torch.distributed.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, without its graph; of one in parts, all ranks have to ask for it together.

    Raises ValueError for one that DeepSpeed has taken to pieces, of which nothing can be seen.
    """
    if tensor.numel() == 0:
        raise ValueError(
            "these numbers lie in parts on several ranks, as DeepSpeed's ZeRO-3 lays them: save inside "
            "`with deepspeed.zero.GatheredParameters(list(reft.parameters())):`, or train with vlreft.ReftTrainer"
        )
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value, which every rank has, into a tensor or into this rank's part of it."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)
