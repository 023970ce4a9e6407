"""`import_adapterhub`: ReFT that AdapterHub's `adapters` saved, as interventions of ours.

Shape suffixes: D = hidden width, R = rank.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlreft.config import Intervention, ReftConfig
from vlreft.models.sites import Sites
from vlreft.reft import Reft
from vlreft.saving.checkpoint import read_json
from vlreft.saving.foreign import (
    SLACK_BYTES,
    Foreign,
    changed_modules,
    check_orthonormal,
    orthogonal_weight,
    put_on,
    read_tensors,
    sites_of,
    take,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_NAMES = ("model_head.safetensors", "pytorch_model_head.bin")
KEY = re.compile(
    r"(?P<stack>[\w.]+)\.(?P<layer>\d{1,6})\.reft_layer\.refts\.(?P<name>[^.]+)\.units\.(?P<unit>[01])\.(?P<what>.+)"
)
ACTIVATIONS = {None: None, "relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu", "tanh": "tanh"}
METHODS = {True: ("loreft", "direft"), False: ("noreft", "nodireft")}  # by orthogonality: subtracting, and not


def import_adapterhub(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    method: str | None = None,
    site: str | None = None,
    head: bool = True,
    name: str = "default",
) -> Reft:
    """Attach a ReFT adapter that AdapterHub's library saved: the folder of `model.save_adapter(folder, ...)`.

    method: "noreft" or "nodireft" (`DiReftConfig`), needed for an adapter without orthogonality, because the folder
        does not say which; AdapterHub itself loads every one as NoReFT. site: where the edited blocks are, by default
        the site whose blocks lie at the path that the file names.
    head: whether a head that was saved beside it is taken, as `modules_to_save`, if it is not the base's own. Heads of
        AdapterHub's `...AdapterModel` classes have no place in a transformers model: write head=False.

    Files are read as tensors alone, nothing in them is run; `save_pretrained` makes safetensors of them. Raises
    ValueError for another kind of adapter, another base, and R without orthonormal rows.

    Source: adapters 1.3.0 `methods/reft.py`. The positions become e.g. "l2+[:3]": a token that is in suffix and prefix
    is the suffix's, as there. Differs: AdapterHub's suffix is the end of the whole row, here of the prompt, which is
    the same where there is no answer; its prefix acts on every token that is generated with a cache, here on the
    prompt's first tokens alone; for a row shorter than prefix or suffix it fails or edits padding, here what there is
    is edited. A unit that has no tokens (of a prefix alone) is left out. Dropout, in training, falls on the edit
    instead of the hidden state.
    """
    path, sites = Path(folder), sites_of(model)
    settings = _settings_in(path)
    method = _method_of(settings, method, path)
    units = _units_in(_weights_in(path, WEIGHTS_NAMES, _max_bytes(sites)), path)
    stacks = {stack: site or _site_at(stack, sites, path) for stack, _, _ in units}
    if site is not None and len(stacks) > 1:
        raise ValueError(f"`site` (={site!r}) is one, and {path} has edits in {list(stacks)}; leave it out")
    items, edits = [], {}
    for number, (stack, where) in enumerate(stacks.items()):
        layers = sorted({layer for other, layer, _ in units if other == stack})
        items.append(_intervention(settings, method, where, layers, path))
        for layer in layers:
            for part, unit in enumerate(_units_of(settings)):
                found = units.get((stack, layer, unit), {})
                edits[number, layer, part] = _parameters_of(found, method, f"{path}: '{stack}.{layer}' unit {unit}")
    modules = _head_in(path, model) if head else {}
    return put_on(model, Foreign(ReftConfig(items), edits, modules, f"the adapter in {path}"), name)


def _max_bytes(sites: Sites) -> int:
    """Return what two units at every block can have: each holds a D x D matrix, and thin ones."""
    return SLACK_BYTES + sum(2 * 32 * site.width**2 * len(site.blocks) for site in sites.by_name.values())


def _settings_in(path: Path) -> dict[str, Any]:
    """Return the adapter's own settings. Raises ValueError for what is no ReFT, or has settings of another kind."""
    if not (path / CONFIG_NAME).is_file():
        raise ValueError(f"no adapter of AdapterHub's in {path}: there is no {CONFIG_NAME}")
    data = read_json(path / CONFIG_NAME).get("config")
    if not isinstance(data, dict) or data.get("architecture") != "reft":
        got = data.get("architecture") if isinstance(data, dict) else data
        raise ValueError(f"{path / CONFIG_NAME}: only adapters of architecture 'reft' can be imported, got {got!r}")
    data = {"dropout": 0.0, "non_linearity": None, "tied_weights": False} | data
    numbers = [data.get(name) for name in ("prefix_positions", "suffix_positions", "r")]
    flags = [data.get(name) for name in ("orthogonality", "tied_weights")]
    if any(type(number) is not int or number < 0 for number in numbers) or any(
        type(flag) is not bool for flag in flags
    ):
        raise ValueError(f"{path / CONFIG_NAME}: positions, 'r' and flags of another kind: {numbers}, {flags}")
    if data["non_linearity"] is not None and data["non_linearity"] not in ACTIVATIONS:
        known = sorted(name for name in ACTIVATIONS if name)
        raise ValueError(f"{path / CONFIG_NAME}: non_linearity {data['non_linearity']!r} is none of {known}")
    return data


def _method_of(settings: Mapping[str, Any], given: str | None, path: Path) -> str:
    known = METHODS[settings["orthogonality"]]
    if given is not None:
        if given not in known:
            raise ValueError(f"`method` (={given!r}) must be one of {known}, by the orthogonality that {path} says")
        return given
    subtracts = settings.get("subtract_projection", True if settings["orthogonality"] else None)
    if subtracts is None:
        raise ValueError(
            f"{path / CONFIG_NAME} does not say whether it was made with NoReftConfig or DiReftConfig: write "
            "method='noreft' or method='nodireft'"
        )
    return known[0] if subtracts else known[1]


def _intervention(settings: Mapping[str, Any], method: str, site: str, layers: list[int], path: Path) -> Intervention:
    prefix, suffix = settings["prefix_positions"], settings["suffix_positions"]
    # The suffix comes first, and takes the tokens that are in both; "f3+l2" would share a short row by halves.
    parts = [f"l{suffix}"] * bool(suffix) + [f"[:{prefix}]"] * bool(prefix)
    if not parts:
        raise ValueError(f"{path / CONFIG_NAME}: it edits no positions")
    try:
        return Intervention(
            method,
            site=site,
            layers=layers,
            positions="+".join(parts),
            rank=settings["r"],
            tied=settings["tied_weights"] and len(parts) == 2,
            init="reference",
            activation=ACTIVATIONS[settings["non_linearity"]],
            dropout=settings["dropout"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG_NAME}: {error}") from error


def _units_of(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return which unit each part of the positions has: 0 the prefix or both, 1 the suffix."""
    if settings["tied_weights"]:
        return (0,)
    return (1,) * bool(settings["suffix_positions"]) + (0,) * bool(settings["prefix_positions"])


def _weights_in(path: Path, names: tuple[str, ...], max_bytes: int) -> dict[str, Tensor]:
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"no weights in {path}: there is none of {', '.join(names)}")
    return read_tensors(file, max_bytes)


def _units_in(tensors: Mapping[str, Tensor], path: Path) -> dict[tuple[str, int, int], dict[str, Tensor]]:
    """Return the tensors of each unit, by the path of its blocks, layer and number."""
    units: dict[tuple[str, int, int], dict[str, Tensor]] = {}
    names = set()
    for key, tensor in tensors.items():
        if (match := KEY.fullmatch(key)) is None:
            raise ValueError(
                f"{path}: '{key}' is no tensor of ReFT alone; adapters of several kinds cannot be imported"
            )
        names.add(match["name"])
        units.setdefault((match["stack"], int(match["layer"]), int(match["unit"])), {})[match["what"]] = tensor
    if len(names) != 1:
        raise ValueError(f"{path} must hold one adapter, got {sorted(names)}")
    return units


def _site_at(stack: str, sites: Sites, path: Path) -> str:
    """Return the site whose blocks lie at a path, up to what a head puts in front of it on either side."""
    found = [
        site.name
        for site in sites.by_name.values()
        if site.name != "connector" and (f".{stack}".endswith(f".{site.path}") or f".{site.path}".endswith(f".{stack}"))
    ]
    if len(found) != 1:
        have = {site.name: site.path for site in sites.by_name.values()}
        raise ValueError(f"{path} edits the blocks at '{stack}', {sites.model_name} has them at {have}; write `site`")
    return found[0]


def _parameters_of(tensors: Mapping[str, Tensor], method: str, where: str) -> dict[str, Tensor]:
    source = ("learned_source.weight", "learned_source.bias")
    if method in METHODS[False]:
        projection_RD, weight_RD, bias_R = take(tensors, ("projection.weight", *source), where)
        return {"projection": projection_RD, "weight": weight_RD, "bias": bias_R}
    held = tuple(f"projection.parametrizations.weight.{name}" for name in ("original", "0.base"))
    original_RD, base_DD, weight_RD, bias_R = take(tensors, (*held, *source), where)
    r_RD = check_orthonormal(orthogonal_weight(original_RD, base_DD, where), where)
    return {"rotation": r_RD, "weight": weight_RD, "bias": bias_R}


def _head_in(path: Path, model: nn.Module) -> dict[str, Tensor]:
    if not any((path / name).is_file() for name in HEAD_NAMES):
        return {}
    max_bytes = 8 * sum(parameter.numel() for parameter in model.parameters()) + SLACK_BYTES
    return changed_modules(_weights_in(path, HEAD_NAMES, max_bytes), model, f"the head in {path}")
