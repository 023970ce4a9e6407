"""`merge`: one adapter whose edits are weighted sums of those of others.

Shape suffixes: R = rank, D = width. Every edit that is linear in the state adds `V^T(Wh + b)`; a weighted sum of such
edits is one of the ranks' sum, with the rows of all, so a merge is exact and needs no decomposition.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlreft.attaching import attach
from vlreft.config import Intervention, ReftConfig
from vlreft.edit import Edit
from vlreft.interventions import RED, ConsReFT, DiReFT, LobiReFT, LoReFT, NodiReFT, NoReFT, Vector
from vlreft.reft import Reft, find_refts

LINEAR = {"loreft", "direft", "noreft", "nodireft", "consreft", "lobireft", "vector"}  # `_affine` writes them as one


class Affine(NamedTuple):
    """The edit `V^T(Wh + b)`, rows of each."""

    v_RD: Tensor
    w_RD: Tensor
    b_R: Tensor


def merge(model: nn.Module, weights: Mapping[str, float], name: str = "merged") -> Reft:
    """Attach one adapter that adds to each state the weighted sum of what others, attached, would add to it.

    weights: of the adapters by their names; they have the same sites, layers, components and positions, in the same
        order. Low-rank methods become "nodireft" of the ranks' sum, with 2rd + r numbers; "vector" and "red" stay what
        they are. The config's `scale` is a factor of the weight.

    The others stay attached, and act too: `vlreft.use(model, name)`, or detach them. It is not what stacking them does,
    where each edits what the ones before it have edited. Raises ValueError for adapters at other places, with an
    activation, with `modules_to_save`, and for methods that are not linear in the state.
    """
    refts = _chosen(model, weights)
    _check_places(refts)
    items = [_merged_item(items) for items in zip(*(reft.config.interventions for reft in refts), strict=True)]
    with torch.random.fork_rng(devices=[]):  # the start values are thrown away; leave the user's generator alone
        merged = attach(model, ReftConfig(items), name)
    factors = list(weights.values())
    with torch.no_grad():
        for edit, *theirs in zip(merged.edits.values(), *(reft.edits.values() for reft in refts), strict=True):
            _fill(edit, [(weight * one.scale, one) for weight, one in zip(factors, theirs, strict=True)])
    return merged


def _chosen(model: nn.Module, weights: Mapping[str, float]) -> list[Reft]:
    attached = find_refts(model)
    unknown = [name for name in weights if name not in attached]
    if unknown or not weights:
        raise ValueError(f"no adapter {unknown or 'was named'}; attached are {list(attached)}: give them their weights")
    refts = [attached[name] for name in weights]
    for reft in refts:
        if reft.config.modules_to_save:
            raise ValueError(f"the adapter '{reft.name}' has `modules_to_save`, which are not merged; leave it out")
    return refts


def _check_places(refts: Sequence[Reft]) -> None:
    """Raise ValueError where two adapters do not edit the same places."""
    places = [_places(reft) for reft in refts]
    for reft, others in zip(refts, places, strict=True):
        if differing := [pair for pair in zip_longest(places[0], others) if pair[0] != pair[1]]:
            raise ValueError(
                f"the adapters '{refts[0].name}' and '{reft.name}' do not edit the same places in the same order: "
                f"{differing[0][0]} against {differing[0][1]}; stack them with `vlreft.use` instead"
            )


def _places(reft: Reft) -> list[str]:
    """Return where each edit acts: its key, which says all but the segment, and whether parts are tied."""
    items = reft.config.interventions
    numbers = [int(key.partition(":")[0]) for key in reft.edits.keys()]
    segments = [items[number].parsed_positions.segment for number in numbers]
    return [f"{key} of {segment}" for key, segment in zip(reft.edits.keys(), segments, strict=True)]


def _merged_item(items: Sequence[Intervention]) -> Intervention:
    """Return the intervention that can hold a sum of several. Raises ValueError if there is none."""
    methods = {item.method for item in items}
    if any(item.activation for item in items):
        raise ValueError("an intervention with an activation is not linear, so it cannot be merged; stack the adapters")
    if methods in ({"vector"}, {"red"}):
        return replace(items[0], dropout=0.0, scale=1.0)
    ranks = [1 if item.method == "vector" else item.rank for item in items]
    if not methods <= LINEAR or None in ranks:
        raise ValueError(
            f"the methods {sorted(methods)} have no weighted sum in one edit; {sorted(LINEAR)} have, and 'red' with "
            "itself; stack the adapters with `vlreft.use` instead"
        )
    rank = sum(rank for rank in ranks if rank is not None)
    return replace(items[0], method="nodireft", rank=rank, init="identity", dropout=0.0, scale=1.0, groups=())


def _fill(edit: nn.Module, weighted: Sequence[tuple[float, nn.Module]]) -> None:
    match edit:
        case Vector():
            edit.vector.copy_(_sum(weight * one.vector for weight, one in weighted if isinstance(one, Vector)))
        case RED():
            reds = [(weight, one) for weight, one in weighted if isinstance(one, RED)]
            edit.gain.copy_(1.0 + _sum(weight * (one.gain - 1.0) for weight, one in reds))
            edit.bias.copy_(_sum(weight * one.bias for weight, one in reds))
        case NodiReFT():
            parts = [(weight, _affine(one)) for weight, one in weighted]
            edit.projection.copy_(torch.cat([weight * part.v_RD for weight, part in parts]))
            edit.weight.copy_(torch.cat([part.w_RD for _, part in parts]))
            edit.bias.copy_(torch.cat([part.b_R for _, part in parts]))
        case _:
            raise AssertionError(type(edit).__name__)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def _affine(edit: nn.Module) -> Affine:
    """Write an edit as `V^T(Wh + b)`."""
    assert isinstance(edit, Edit)
    match edit:
        case LoReFT():
            r_RD = edit.orthonormal_rotation(edit.rotation)
            return Affine(r_RD, edit.weight - r_RD, edit.bias)
        case DiReFT():
            return Affine(edit.orthonormal_rotation(edit.rotation), edit.weight, edit.bias)
        case ConsReFT():
            r_RD = edit.orthonormal_rotation(edit.rotation)
            return Affine(r_RD, -r_RD, edit.bias)
        case LobiReFT():
            r_RD = edit.orthonormal_rotation(edit.rotation)
            return Affine(r_RD, torch.zeros_like(r_RD), edit.bias)
        case NoReFT():
            return Affine(edit.projection, edit.weight - edit.projection, edit.bias)
        case NodiReFT():
            return Affine(edit.projection, edit.weight, edit.bias)
        case Vector():
            return Affine(edit.vector[None], torch.zeros_like(edit.vector)[None], edit.vector.new_ones(1))
        case _:
            raise AssertionError(type(edit).__name__)
