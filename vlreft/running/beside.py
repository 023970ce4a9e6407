"""peft's adapters on the same model: found, saved beside the interventions, and kept from silencing them.

Nothing here imports peft unless it is there already: a model cannot have its adapters otherwise.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vlreft.placed import Placed

PEFT_FOLDER = "peft"
PEFT_WEIGHTS = "adapter_model.safetensors"


def peft_model(model: nn.Module) -> Any:
    """Return a model if it is peft's `PeftModel`, which wraps another, else None."""
    peft = sys.modules.get("peft")
    return model if peft is not None and isinstance(model, peft.PeftModel) else None


def without_peft(model: nn.Module) -> nn.Module:
    """Return the model that a `PeftModel` wraps, and any other model as it is."""
    wrapper = peft_model(model)
    return model if wrapper is None else wrapper.get_base_model()


def peft_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the numbers that peft has put into a model: its adapters' own, without the layers that they wrap."""
    tuners, wrappers = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or wrappers is None:
        return []
    found: list[nn.Parameter] = []
    for layer in model.modules():
        if isinstance(layer, (tuners.BaseTunerLayer, wrappers.AuxiliaryTrainingWrapper)):
            names: Any = layer.adapter_layer_names
            parts = [getattr(layer, name, None) for name in names]
            found += [parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()]
    return found


def refuse_frozen(acting: Iterable[Placed], model: nn.Module) -> None:
    """Raise ValueError if a training step would train others and none of these interventions, or offloaded copies.

    peft freezes whatever is on a model when it comes; the loss would fall, and the interventions stay where they are.
    """
    own = False
    for placed in acting:
        for parameter in placed.edit.parameters():
            if parameter.is_meta:
                raise ValueError(
                    "the interventions were offloaded with the base, and what a step trains would be a copy of them: "
                    "offload the base first, then attach them"
                )
            if parameter.requires_grad or placed.switch.is_frozen:
                return
            own = True
    if own and any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the interventions are frozen, but others train: something froze the whole model after `vlreft.attach`, as "
            "peft does; call `reft.requires_grad_()` after it to train them too, `reft.requires_grad_(False)` to keep "
            "them as they are"
        )


@dataclass(frozen=True, eq=False)
class Spot:
    """Where a module is in its model, to see whether peft puts a layer of its own in that place; `what` it is for."""

    what: str
    module: nn.Module
    parent: nn.Module
    name: str

    def refuse_wrapped(self) -> None:
        """Raise ValueError if peft has wrapped the module since: what it adds there would pass by what is done here."""
        now = self.parent._modules.get(self.name)
        if now is self.module or not type(now).__module__.startswith("peft."):
            return
        raise ValueError(
            f"{self.what} is at a {type(self.module).__name__} that peft has wrapped since, and what it adds passes by "
            "it: take the interventions off (`reft.save_pretrained`, `reft.detach`), give the model to peft, then "
            "attach or load them"
        )


def spot_of(model: nn.Module, module: nn.Module, what: str) -> Spot | None:
    """Return where a module is; None for the model itself."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is module:
                return Spot(what, module, parent, name)
    return None


def save_peft(model: nn.Module, folder: Path) -> None:
    """Write peft's adapters into a subfolder, in peft's own format, if the model has any that are trained."""
    wrapper = peft_model(model)
    if wrapper is not None and any(parameter.requires_grad for parameter in peft_parameters(model)):
        wrapper.save_pretrained(str(folder / PEFT_FOLDER), safe_serialization=True)


def load_peft(model: nn.Module, folder: Path) -> None:
    """Copy what `save_peft` wrote into a model's peft adapters, in place, if it has any that are trained.

    Raises ValueError if an adapter's file is missing, broken, or does not hold just its numbers.
    """
    wrapper = peft_model(model)
    if wrapper is None or not any(parameter.requires_grad for parameter in peft_parameters(model)):
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    for name in wrapper.peft_config:
        path = folder / PEFT_FOLDER / ("" if name == "default" else name) / PEFT_WEIGHTS
        if not path.is_file():
            raise ValueError(f"the model has a peft adapter '{name}', and the checkpoint has none: there is no {path}")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        own = get_peft_model_state_dict(wrapper, adapter_name=name)
        if {key: tensor.shape for key, tensor in tensors.items()} != {key: tensor.shape for key, tensor in own.items()}:
            raise ValueError(f"{path} does not fit the model's peft adapter '{name}': it was made with another config")
        set_peft_model_state_dict(wrapper, tensors, adapter_name=name)
