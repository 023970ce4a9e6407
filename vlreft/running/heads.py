"""Heads: modules of the base that are trained whole beside the interventions, as copies that stand in for them.

The base's module stays as it is and still runs; a hook drops its output for that of the copy while the adapter that the
copy belongs to is switched on. Parameters of a copy are float32 (float64 for a float64 base), and so is what it
computes, whatever the base's dtype or an enclosing autocast says, as with interventions; its output has the dtype of
the base's.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vlreft.models.components import Target
from vlreft.models.sites import Sites
from vlreft.placed import Switch
from vlreft.running.beside import Spot, spot_of
from vlreft.running.outputs import add_to_first

HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NUM_LISTED = 8  # candidates that an error names


@dataclass(eq=False)
class Head:
    """A trained copy of a module of the base, which stands in for it while `switch` is on.

    `name` is the config's spelling, `path` where the module is. has_run: whether the module ran in this forward.
    """

    name: str
    path: str
    base: nn.Module
    copy: nn.Module
    switch: Switch
    spot: Spot | None = None
    has_run: bool = False

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return what the copy makes of a call, in the dtypes of the base's output."""
        parameter = next(self.copy.parameters())
        with torch.autocast(parameter.device.type, enabled=False):
            args, kwargs = _in_dtype(args, parameter.dtype), _in_dtype(kwargs, parameter.dtype)
            return _in_dtypes_of(self.copy(*args, **kwargs), output)


class HeadHooks:
    """The hooks of all heads on one model. Made by the first `attach`, gone with the last `detach`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_module: dict[nn.Module, list[Head]] = {}
        self._handles: dict[nn.Module, Any] = {}
        self._on_the_model: list[Any] = []

    def __iter__(self) -> Iterator[Head]:
        """Yield the heads of all adapters."""
        for heads in self.by_module.values():
            yield from heads

    def place(self, head: Head) -> None:
        """Add a head; of several for one module that are switched on, the last placed stands in for it."""
        if not self._on_the_model:
            self._on_the_model = [
                self.model.register_forward_pre_hook(self._enter),
                self.model.register_forward_hook(self._leave),
            ]
        if head.base not in self.by_module:
            self.by_module[head.base] = []
            # In front of all other hooks, which then see what the model goes on with.
            self._handles[head.base] = head.base.register_forward_hook(self._stand_in, prepend=True, with_kwargs=True)
        self.by_module[head.base].append(head)

    def remove(self, switch: Switch) -> None:
        """Take out the heads that were placed with `switch`, and the hooks nobody needs any more."""
        for module, heads in list(self.by_module.items()):
            self.by_module[module] = [head for head in heads if head.switch is not switch]
            if not self.by_module[module]:
                self._handles.pop(module).remove()
                del self.by_module[module]
        if not self.by_module:
            for handle in self._on_the_model:
                handle.remove()
            self._on_the_model = []

    def _stand_in(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        for head in reversed(self.by_module[module]):
            if head.switch.on:
                head.has_run = True
                return head.run(args, kwargs, output)
        return None

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for head in self:
            head.has_run = False
            if head.spot is not None:
                head.spot.refuse_wrapped()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Give heads that did not run a zero gradient, for which data-parallel training would wait for ever.

        A connector does not run in a batch without an image.
        """
        if not (module.training and torch.is_grad_enabled()):
            return None
        idle = [head for head in self if head.switch.on and not head.has_run]
        zeros = [parameter.sum() * 0.0 for head in idle for parameter in head.copy.parameters()]
        if not zeros:
            return None
        return add_to_first(output, torch.stack([zero.to(zeros[0]) for zero in zeros]).sum())


def make_heads(names: Sequence[str], sites: Sites, present: Iterable[Head], switch: Switch) -> list[Head]:
    """Copy the named modules of a model. Raises ValueError for a name that is not exactly one module to train.

    `present` are the heads of other adapters.
    """
    made: list[Head] = []
    for name in names:
        path, module = _find(name, sites)
        where = f"`modules_to_save` '{name}' of {sites.model_name}"
        for other in made:
            if other.base is module:
                raise ValueError(f"{where} is the module that '{other.name}' names too; leave one of them out")
        for other in (*made, *present):
            if other.base is not module and (_is_inside(module, other.base) or _is_inside(other.base, module)):
                raise ValueError(
                    f"{where} and '{other.name}' lie one inside the other ('{path}', '{other.path}'), and only the "
                    "outer one would be heard; train one of them"
                )
        _refuse_module(where, module, sites.model)
        spot = spot_of(sites.model, module, f"`modules_to_save` '{name}'")
        made.append(Head(name, path, module, _trainable_copy(module), switch, spot))
    return made


def refuse_edits_inside(heads: Iterable[Head], edited: Iterable[tuple[str, Target]]) -> None:
    """Raise ValueError for edits in a module that a copy without them stands in for; edits of its input reach both."""
    edited = list(edited)
    for head in heads:
        for where, target in edited:
            if _is_inside(target.module, head.base) and not (target.at_input and target.module is head.base):
                raise ValueError(
                    f"`modules_to_save` '{head.name}' (a {type(head.base).__name__}) contains {where}, which an "
                    "intervention edits: its copy would run without the edit; train what lies before or behind it"
                )


def _find(name: str, sites: Sites) -> tuple[str, nn.Module]:
    """Return the one module that a name means: a whole path, or the end of one."""
    known = {
        path: module
        for path, module in sites.model.named_modules(remove_duplicate=False)
        if path and path.partition(".")[0] != "vlreft"
    }
    if name in known:
        return name, known[name]
    matches = {path: module for path, module in known.items() if path.endswith(f".{name}")}
    if not matches:
        raise ValueError(
            f"`modules_to_save`: {sites.model_name} has no module '{name}'; it has "
            f"{_listed(_outside_of_stacks(sites))}, and every module by its path"
        )
    if len(set(matches.values())) > 1:
        raise ValueError(
            f"`modules_to_save`: '{name}' is {len(matches)} modules of {sites.model_name}, {_listed(matches)}; "
            "give the whole path of one"
        )
    return next(iter(matches.items()))


def _outside_of_stacks(sites: Sites) -> Iterator[str]:
    """Yield the paths of the largest modules with parameters that hold no stack of blocks: heads and connectors."""
    stacks = [stack.path for stack in sites.stacks]

    def walk(module: nn.Module, path: str) -> Iterator[str]:
        for child_name, child in module.named_children():
            child_path = f"{path}.{child_name}" if path else child_name
            if child_path in stacks or child_path == "vlreft" or next(child.parameters(), None) is None:
                continue
            if any(stack.startswith(f"{child_path}.") for stack in stacks):
                yield from walk(child, child_path)
            else:
                yield child_path

    return walk(sites.model, "")


def _listed(paths: Iterable[str]) -> str:
    several = [f"'{path}'" for path in paths]
    more = f" and {len(several) - NUM_LISTED} more" if len(several) > NUM_LISTED else ""
    return ", ".join(several[:NUM_LISTED]) + more


def _is_inside(module: nn.Module, outer: nn.Module) -> bool:
    return any(inner is module for inner in outer.modules())


def _refuse_module(where: str, module: nn.Module, model: nn.Module) -> None:
    """Raise ValueError for a module that cannot be trained as a copy, with the reason."""
    if type(module).forward is nn.Module.forward:
        raise ValueError(f"{where} is a {type(module).__name__}, which is never called; name the modules in it")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if not parameters:
        raise ValueError(f"{where} (a {type(module).__name__}) has no parameters to train")
    frozen = [name for name, parameter in parameters.items() if not parameter.is_floating_point()]
    if frozen:
        raise ValueError(
            f"{where} is quantised: its '{frozen[0]}' is {parameters[frozen[0]].dtype}; leave it out when quantising"
        )
    if buffers := [name for name in module.state_dict() if name not in parameters]:
        raise ValueError(
            f"{where} keeps more than parameters ({_listed(buffers)}): such numbers move in training by themselves, in "
            "the frozen base too, as those of batch normalisation do; train a module without them"
        )
    if any(p.is_meta for p in parameters.values()) and any(hasattr(m, "_hf_hook") for m in module.modules()):
        raise ValueError(f"{where} is offloaded, so there is nothing to copy; give it a place in the `device_map`")
    own, inside = {id(parameter): name for name, parameter in parameters.items()}, set(module.modules())
    for other_path, other in model.named_modules():
        for name, parameter in other._parameters.items():
            if other not in inside and id(parameter) in own:
                raise ValueError(
                    f"{where} shares its '{own[id(parameter)]}' with '{other_path + '.' if other_path else ''}{name}': "
                    "training it would tear the two apart; untie them (`tie_word_embeddings=False`) or train another"
                )


def _trainable_copy(module: nn.Module) -> nn.Module:
    """Copy a module to train, without the hooks that sit on it.

    Hooks of others further inside stay, shared with the base's: some modules need them. Configs are shared too, which
    models change when told to use another attention.
    """
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for kind in HOOK_KINDS:
            hooks: Mapping[int, Any] = getattr(inner, kind)
            kept = {} if inner is module else {key: hook for key, hook in hooks.items() if not _is_ours(hook)}
            memo[id(hooks)] = OrderedDict(kept)
        memo |= {id(value): value for value in vars(inner).values() if isinstance(value, PreTrainedConfig)}
    twin = copy.deepcopy(module, memo)
    twin._apply(_at_least_float32)
    return twin.requires_grad_(True)


def _is_ours(hook: object) -> bool:
    return getattr(getattr(hook, "func", hook), "__module__", "").startswith("vlreft.")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return arguments with their floating tensors in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_in_dtype(item, dtype) for item in value)
    if type(value) is dict:
        return {name: _in_dtype(item, dtype) for name, item in value.items()}
    return value


def _in_dtypes_of(value: Any, other: Any) -> Any:
    """Return an output with its tensors in the dtypes of another output of the same structure."""
    if isinstance(value, Tensor):
        return value.to(other.dtype)
    if type(value) in (tuple, list):
        return type(value)(_in_dtypes_of(*pair) for pair in zip(value, other, strict=True))
    if isinstance(value, dict):
        for name in value:
            value[name] = _in_dtypes_of(value[name], other[name])
    return value
