"""`attach` and `load`: put interventions on the model the user already has, in place."""

import os
import re

import torch
from torch import nn

from vlreft.config import ReftConfig
from vlreft.edit import Edit
from vlreft.models.sites import Sites, find_sites
from vlreft.placed import Placed, Switch, Where
from vlreft.plan import Entry, plan_edits
from vlreft.reft import CHILD_NAME, RESERVED_NAMES, Adapters, Parts, Reft, find_adapters, find_reft
from vlreft.running.beside import peft_parameters
from vlreft.running.heads import make_heads, refuse_edits_inside
from vlreft.running.hooks import Runtime, forget_compiled_graphs
from vlreft.saving.checkpoint import check_base, check_plan, copy_tensors, describe_base, read_checkpoint
from vlreft.saving.hub import folder_of


def attach(model: nn.Module, config: ReftConfig, name: str = "default") -> Reft:
    """Put interventions on `model`, in place, and freeze everything else in it.

    The model stays the object it was: training, `generate`, pipelines and saving go on with it. New interventions draw
    their start from torch's generator, in float32, on their block's device. Several sets under different names act in
    the order in which they were attached.

    Raises ValueError or TypeError, before anything was changed: a name in use, a site or segment that the model lacks,
    a layer out of range or never read, a rank above the width, a module to train that is not exactly one.
    """
    if not isinstance(config, ReftConfig):
        raise TypeError(f"`config` must be a vlreft.ReftConfig, got {type(config).__name__}")
    sites = _sites_for(model, name)
    return _put_on(config, name, make_parts(config, sites), sites)


def load(
    model: nn.Module, folder: str | os.PathLike[str], name: str = "default", *, revision: str | None = None
) -> Reft:
    """Attach a saved adapter to its base: from a folder, or from the hub by a name as "user/name".

    revision: a branch, tag or commit on the hub. Raises ValueError for another base, or a file that is not whole and
    exact; then the model is as it was.
    """
    folder = folder_of(folder, revision)
    checkpoint = read_checkpoint(folder)
    sites = _sites_for(model, name)
    check_base(checkpoint.base, describe_base(model, sites), folder)
    check_plan(checkpoint, plan_edits(checkpoint.config, sites), folder)
    with torch.random.fork_rng(devices=[]):  # the start values are thrown away; leave the user's generator alone
        made = make_parts(checkpoint.config, sites)
    copy_tensors(checkpoint.tensors, dict(made.parts.named_parameters()), f"the checkpoint in {folder}")
    return _put_on(checkpoint.config, name, made, sites)


def _sites_for(model: nn.Module, name: str) -> Sites:
    """Return the sites of a model that can have an adapter of this name. Raises ValueError if it cannot."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) or name in RESERVED_NAMES:
        raise ValueError(f"`name` (={name!r}) must be letters, digits, '_' and '-', and no attribute of a ModuleDict")
    if find_reft(model, name) is not None:
        raise ValueError(f"interventions named '{name}' are attached already; detach them or choose another `name`")
    adapters = find_adapters(model)
    if adapters is not None:
        return adapters.runtime.sites
    sites = find_sites(model)
    if hasattr(model, CHILD_NAME):
        raise ValueError(f"{sites.model_name} has a '{CHILD_NAME}' of its own, where interventions are kept; rename it")
    return sites


def make_parts(config: ReftConfig, sites: Sites) -> Parts:
    """Make an adapter's modules; the model is not changed. Raises ValueError for a config that it has no place for."""
    plan, switch, adapters = plan_edits(config, sites), Switch(), find_adapters(sites.model)
    present = list(adapters.head_hooks) if adapters is not None else []
    hooked = list(adapters.runtime.hooked.values()) if adapters is not None else []
    heads = make_heads(config.modules_to_save, sites, present, switch)
    planned = [(f"site '{entry.site.name}' layer {entry.layer}", entry.target) for entry in plan]
    earlier = [(f"site '{item.site.name}' layer {item.layer}", item.target) for item in hooked]
    refuse_edits_inside(heads, planned + earlier)
    refuse_edits_inside(present, planned)
    edits = nn.ModuleDict({entry.key: entry.build() for entry in plan})
    parts = nn.ModuleDict(dict(edits.items()))
    if heads:
        parts["modules_to_save"] = nn.ModuleDict({head.name.replace(".", "/"): head.copy for head in heads})
    return Parts(plan, edits, heads, parts, switch, [_place(entry, edits[entry.key], switch) for entry in plan])


def _place(entry: Entry, edit: nn.Module, switch: Switch) -> Placed:
    assert isinstance(edit, Edit)
    where = Where(entry.number, entry.site.name, entry.layer, entry.item.component)
    return Placed(switch, edit, entry.item.parsed_positions, entry.part, where, entry.span)


def _put_on(config: ReftConfig, name: str, made: Parts, sites: Sites) -> Reft:
    """Put what was made on the model."""
    model, adapters = sites.model, find_adapters(sites.model)
    if adapters is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        for parameter in set(peft_parameters(model)) & set(trainable):  # trained together, unless somebody says not
            parameter.requires_grad_(True)
        adapters = Adapters(Runtime(model, sites), trainable)
        model.add_module(CHILD_NAME, adapters)
    reft = Reft(config, name, made, sites)
    adapters[name] = made.parts.train(model.training)
    adapters.refts[name] = reft
    for entry, placed in zip(made.plan, made.placed, strict=True):
        adapters.runtime.place(entry.site, entry.layer, entry.item.component, entry.target, placed)
    for head in made.heads:
        adapters.head_hooks.place(head)
    forget_compiled_graphs()
    return reft
