"""Ways to train a base's own numbers: its biases, its normalisations, its last linear layer, or all of them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from optuna.distributions import CategoricalDistribution
from torch import nn
from transformers import PreTrainedModel

from tasks.methods.method import Adapted, Choice, Distributions, Method, Space, rates, trained_in_place
from tasks.setups import Setup
from vlreft.models.sites import find_sites
from vlreft.models.stacks import VISION_NAMES

Parameters = dict[str, nn.Parameter]


@contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """Let a model be changed inside; afterwards it has the modules, tensors, hooks, flags and buffers that it had.

    Numbers that are trained in place are `trained_in_place`'s to restore; a tensor that another was put in the place of
    is back, since it is kept here.
    """
    parts = [(vars(module), dict(vars(module)), _contents(module)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    tensors = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for now, before, contents in parts:
            for key in now.keys() - before.keys():
                del now[key]
            now.update(before)
            for key, items in contents.items():
                now[key].clear()  # in place: the handles of hooks know the very dictionary
                now[key].update(items)
        for parameter, data, is_trained in tensors:
            parameter.data = data
            parameter.requires_grad_(is_trained)
            parameter.grad = None
        with torch.no_grad():
            for buffer, numbers in buffers:
                buffer.copy_(numbers)


def _contents(module: nn.Module) -> dict[str, dict]:
    return {key: dict(value) for key, value in vars(module).items() if isinstance(value, dict)}


def head_parameters(setup: Setup) -> Parameters:
    """Return the numbers of the modules that the base has no trained weights for: every method trains them."""
    named = setup.model.named_parameters()
    return {name: parameter for name, parameter in named if any(name.startswith(f"{head}.") for head in setup.heads)}


def refusal(name: str, setup: Setup, why: str, instead: str) -> ValueError:
    """Return the error that says why a method cannot adapt a base, and which one can."""
    return ValueError(f"method '{name}' cannot adapt a {type(setup.model).__name__}: {why}; use {instead} instead")


def trained(model: nn.Module) -> Parameters:
    """Return what is trainable, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def biases(model: nn.Module) -> Parameters:
    """Return every bias term, the normalisations' too. Source: Ben Zaken et al. 2022, "BitFit"."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2].endswith("bias") and p.dim()}


def norms(model: nn.Module) -> Parameters:
    """Return weights and biases of all LayerNorm and RMSNorm modules. Source: Zhao et al. 2024, "LayerNorm tuning"."""
    return {
        name: parameter
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not isinstance(module, nn.modules.batchnorm._NormBase)
        for name, parameter in module.named_parameters(path, recurse=False)
        if parameter.dim() == 1
    }


def everything(model: nn.Module) -> Parameters:
    """Return all numbers."""
    return dict(model.named_parameters())


@dataclass(frozen=True)
class WeightsMethod(Method):
    """Some of a base's own numbers are trained where they are. pick: returns all that could be.

    placement: `part`, where a base has both: its "text" (all but the tower), its "vision" tower, or "all".
    """

    name: str
    title: str
    pick: Callable[[nn.Module], Parameters]
    what: str
    learning_rates: tuple[float, float] = (1e-4, 1e-1)

    def space(self, setup: Setup) -> Space:
        """Choose the part and the learning rate. Raises ValueError if the base has no such numbers."""
        parts = self._parts(setup)
        placement: Distributions = {"part": CategoricalDistribution(tuple(parts))}
        return Space(placement, {"learning_rate": rates(*self.learning_rates)}, tuple({"part": part} for part in parts))

    @contextmanager
    def adapted(self, setup: Setup, choice: Choice) -> Iterator[Adapted]:
        """Let the part's numbers, and a head that has none yet, be trained inside."""
        model = setup.model
        with (
            given_back(model),
            trained_in_place(model, {**self._parts(setup)[choice["part"]], **head_parameters(setup)}),
        ):
            yield Adapted(model, trained(model))

    def _parts(self, setup: Setup) -> dict[str, Parameters]:
        heads = head_parameters(setup)
        found = {name: p for name, p in self.pick(setup.model).items() if name not in heads}
        if not found:
            raise refusal(self.name, setup, f"it has no {self.what}", "'lora' or 'loreft'")
        is_vision = _vision_names(setup.model)
        parts = {
            "text": {name: p for name, p in found.items() if not is_vision(name)},
            "vision": {name: p for name, p in found.items() if is_vision(name)},
        }
        return {**parts, "all": found} if all(parts.values()) else {"all": found}


def _vision_names(model: nn.Module) -> Callable[[str], bool]:
    """Return whether a name is one of the tower's, or of what stands beside it under its name, as a projection."""
    site = find_sites(model).by_name.get("vision")
    tower = None if site is None or site.tower is None else site.tower.module
    paths = tuple(f"{path}." for path, module in model.named_modules() if module is tower and path)
    return lambda name: name.startswith((*paths, *VISION_NAMES))


@dataclass(frozen=True)
class HeadMethod(Method):
    """A linear probe: the last linear layer alone is trained.

    That is the classifier of a model that has one; of a dual encoder, the projection behind its image tower; of a model
    that generates, a copy of the output embedding that is tied to nothing.
    """

    name: str = "head"
    title: str = "last layer"
    learning_rates: tuple[float, float] = (1e-4, 1e-1)

    def space(self, setup: Setup) -> Space:
        """Choose the learning rate. Raises ValueError if there is no such layer."""
        self._layer(setup)
        return Space({}, {"learning_rate": rates(*self.learning_rates)}, ({},))

    @contextmanager
    def adapted(self, setup: Setup, choice: Choice) -> Iterator[Adapted]:
        """Let the layer be trained inside."""
        model, layer = setup.model, self._layer(setup)
        if setup.task.kind != "generate":
            with given_back(model), trained_in_place(model, layer):
                yield Adapted(model, trained(model))
            return
        with given_back(model):
            path = next(iter(layer)).rpartition(".")[0]
            own = copy.deepcopy(model.get_submodule(path))
            model.set_submodule(path, own)
            model.requires_grad_(False)
            own.requires_grad_(True)
            yield Adapted(model, trained(model))

    def _layer(self, setup: Setup) -> Mapping[str, nn.Parameter]:
        find = {"generate": _output_embedding, "sequence": _classifier}.get(setup.task.kind, _image_projection)
        if not (layer := find(setup)):
            raise refusal(self.name, setup, "its last linear layer was not found", "'norms' or 'lora'")
        return layer


def _output_embedding(setup: Setup) -> Parameters:
    output = setup.model.get_output_embeddings() if isinstance(setup.model, PreTrainedModel) else None
    path = next((path for path, module in setup.model.named_modules() if module is output), "")
    return {} if not path or output is None else dict(output.named_parameters(path))


def _classifier(setup: Setup) -> Parameters:
    """Return the head that has no trained weights yet, else the last linear layer behind the blocks."""
    if setup.heads:
        return head_parameters(setup)
    layers = [(path, module) for path, module in _outside_blocks(setup.model) if isinstance(module, nn.Linear)]
    return {} if not layers else dict(layers[-1][1].named_parameters(layers[-1][0]))


def _image_projection(setup: Setup) -> Parameters:
    """Return the last matrix behind the image tower's blocks: a layer's, with its bias, or the tower's own."""
    is_vision = _vision_names(setup.model)
    found: Parameters = {}
    for path, module in _outside_blocks(setup.model):
        for name, parameter in module.named_parameters(path, recurse=False):
            is_last = "proj" in name or ".head" in name
            if is_vision(name) and is_last and parameter.dim() == 2:
                is_layer = isinstance(module, nn.Linear)
                found = dict(module.named_parameters(path)) if is_layer else {name: parameter}
    return found


def _outside_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    stacks = tuple(f"{stack.path}." for stack in find_sites(model).stacks)
    return ((path, module) for path, module in model.named_modules() if not path.startswith(stacks))
