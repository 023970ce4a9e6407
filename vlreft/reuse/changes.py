"""Whether numbers were written to since they were read."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary


class Changes:
    """Knows tensors by where they lie and how often they were written to, for as long as it lives.

    torch counts what is written in place, but fused optimizers, as transformers takes them by default, write without
    counting (seen with torch 2.14): their steps are counted here. In-place writes through `tensor.data` stay unseen.
    """

    def __init__(self) -> None:
        self._num_steps = WeakTensorKeyDictionary()
        handle = register_optimizer_step_post_hook(_counting(self._num_steps))
        weakref.finalize(self, handle.remove)

    def versions(self, tensors: Iterable[Tensor]) -> list[tuple[int, int, int]]:
        """Return of each tensor what is another one once it was written to."""
        steps = {id(tensor): num for tensor, num in self._num_steps.items()}
        return [(t.data_ptr(), 0 if t.is_inference() else t._version, steps.get(id(t), 0)) for t in tensors]


def _counting(num_steps: WeakTensorKeyDictionary) -> Callable[[Optimizer, Any, Any], None]:
    def count(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                num_steps[parameter] = (num_steps.get(parameter) or 0) + 1

    return count
