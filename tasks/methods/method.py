"""`Method`: one way to adapt a frozen base, what can be chosen about it, and how the base gets back what it was."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.setups import Setup

WEIGHTS = "numbers.safetensors"

# What was chosen, by name: plain JSON.
Choice = Mapping[str, Any]
Distributions = Mapping[str, BaseDistribution]


@dataclass(frozen=True)
class Space:
    """What can be chosen. placement: where, and how much; training: how it is trained (`learning_rate` at least).

    starts: placements that are tried first, so that a search sees each kind of place before it compares mixtures.
    """

    placement: Distributions
    training: Distributions
    starts: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Adapted:
    """A base that is ready to be trained. model: what the trainer trains. parameters: all that it trains, by name."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    save_own: Callable[[Path], None] | None = None
    load_own: Callable[[Path], None] | None = None

    @property
    def num_trained(self) -> int:
        """Count the trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def save(self, folder: Path) -> int:
        """Write what was trained; return the bytes that it takes."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.save_own is not None:
            self.save_own(folder)
        else:
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters.items()}
            save_file(tensors, folder / WEIGHTS)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, in place. Raises ValueError if it is of other names or shapes."""
        if self.load_own is not None:
            return self.load_own(folder)
        tensors = load_file(folder / WEIGHTS)
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise ValueError(f"{folder / WEIGHTS} holds the numbers of another method, or of other choices")
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
        return None


class Method(ABC):
    """A way to adapt a base. `name` is how it is asked for, `title` how a table has it."""

    name: str
    title: str

    @abstractmethod
    def space(self, setup: Setup) -> Space:
        """Return what can be chosen for this base. Raises ValueError, with the reason, if it cannot be adapted so."""

    def plain(self, setup: Setup, choice: Choice) -> dict[str, Any]:
        """Return the choice with all that makes no difference in it set to one value, so that twins are equal."""
        return dict(choice)

    @abstractmethod
    def adapted(self, setup: Setup, choice: Choice) -> AbstractContextManager[Adapted]:
        """Adapt the base inside; afterwards, also after an exception, it is what it was, bit for bit."""


def rates(low: float, high: float) -> FloatDistribution:
    """Return learning rates from `low` to `high`, even on a logarithmic scale."""
    return FloatDistribution(low, high, log=True)


@contextmanager
def trained_in_place(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let some of a base's own numbers be trained inside; afterwards they are what they were, and as frozen."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
