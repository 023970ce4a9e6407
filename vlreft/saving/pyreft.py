"""`import_pyreft`: interventions that pyreft saved, as interventions of ours.

Shape suffixes: D = hidden width, R = rank.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlreft.config import Intervention, ReftConfig
from vlreft.positions import parse_positions
from vlreft.reft import Reft
from vlreft.saving.checkpoint import MAX_NAMED, read_json
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

METHODS = {
    "LoreftIntervention": "loreft",
    "DireftIntervention": "direft",
    "NoreftIntervention": "noreft",
    "NodireftIntervention": "nodireft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
}
COMPONENTS = {"block_output": "output", "block_input": "input", "mlp_output": "mlp", "attention_output": "attention"}
# Newer files have "_" between the words, older ones ".".
FILE = re.compile(r"intkey_(?:layer[._](\d{1,6})[._])?comp[._](.+)[._]unit[._]pos[._]nunit[._]\d+#(\d{1,6})\.bin")
BLOCK_PATH = re.compile(r"[\w.]+\[(\d{1,6})\][._]output")  # "model.layers[3].output"
LINK = 9  # where `intervention_link_key` is in what pyvene saves of a representation
MODULES_NAME = "pytorch_model.bin"
SIZES = ("embed_dim", "interchange_dim")  # buffers of pyvene's, of no use


@dataclass(frozen=True)
class _File:
    path: Path
    layer: int
    component: str
    number: int


def import_pyreft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    positions: str,
    *,
    method: str | None = None,
    activation: str | None = None,
    site: str = "text",
    head: bool = True,
    name: str = "default",
) -> Reft:
    """Attach interventions that pyreft saved: `reft_model.save(folder)`, or its trainer's `intervenable_model` folder.

    positions: pyreft's `position`, e.g. "f7+l7", which it does not save. Two files for a layer are prefix and suffix,
        one is both (`share_weights`).
    method: needed where the folder has no config.json, as the trainer's, and the numbers fit several. activation:
        pyreft's `act_fn`, which is not saved either. site: where the blocks are.
    head: whether parameters of the base that were trained too (`pytorch_model.bin`) are taken, as `modules_to_save`.

    Files are read as tensors alone, nothing in them is run; `save_pretrained` makes safetensors of them. Raises
    ValueError for a folder of another kind, another base, and R without orthonormal rows.

    Source: pyreft 0.1.0 `interventions.py`, `dataset.py`, pyvene 0.1.8 `intervenable_base.py`. Differs: pyreft edits
    at most floor(n / 2) tokens at each end of a prompt of n tokens, of "l7" alone too; here "f+l" covers a short prompt
    whole and "l7" alone takes what there is. The pad token that pyreft puts in front is not needed. Edits are computed
    in float32, where pyreft's W is bfloat16 by default. NoReFT's two biases become one.
    """
    path, sites = Path(folder), sites_of(model)
    named = _method_of(path, method)
    max_bytes = 32 * sites[site].width ** 2 + SLACK_BYTES
    read = {file: _read(file.path, named, activation, max_bytes) for file in _files_in(path)}
    items, edits = [], {}
    for number, ((kind, rank, component, num_files), files) in enumerate(_groups(read).items()):
        item = Intervention(
            kind,
            site=site,
            layers=sorted({file.layer for file in files}),
            component=component,
            positions=positions,
            rank=rank,
            tied=_is_tied(positions, num_files, path),
            init="reference",
            activation=activation,
        )
        items.append(item)
        edits |= {(number, file.layer, file.number): read[file][1] for file in files}
    modules = _modules_in(path, model) if head else {}
    return put_on(model, Foreign(ReftConfig(items), edits, modules, f"the pyreft folder {path}"), name)


def _files_in(path: Path) -> list[_File]:
    """Return the files, each with what its name says."""
    files = [_parse(file) for file in sorted(path.glob("intkey_*.bin"))]
    if not files:
        raise ValueError(
            f"no pyreft interventions in {path}: there is no intkey_*.bin; pyreft's trainer keeps them in "
            "checkpoint-N/intervenable_model"
        )
    if len({(file.component, file.layer, file.number) for file in files}) != len(files):
        raise ValueError(f"{path} has two files for one intervention: {[file.path.name for file in files][:MAX_NAMED]}")
    return files


def _read(file: Path, method: str | None, activation: str | None, max_bytes: int) -> tuple[str, dict[str, Tensor]]:
    """Return the method and the parameters of a file."""
    tensors = read_tensors(file, max_bytes)
    method = method or _method_by_names(tensors, file)
    second_R = tensors.get("proj_layer.bias")
    if method == "noreft" and activation is not None and second_R is not None and bool(second_R.any()):
        raise ValueError(f"{file} has a second bias, behind the activation '{activation}': there is none here")
    return method, _PARAMETERS[method](tensors, str(file))


def _groups(read: Mapping[_File, tuple[str, dict[str, Tensor]]]) -> dict[tuple[str, int, str, int], list[_File]]:
    """Return the files that are one intervention of ours: of one method, rank, component and number for each layer."""
    groups: dict[tuple[str, int, str, int], list[_File]] = {}
    for file, (method, parameters) in read.items():
        siblings = [other.number for other in read if (other.layer, other.component) == (file.layer, file.component)]
        if sorted(siblings) != list(range(len(siblings))):
            raise ValueError(
                f"{file.path.parent}: the files of layer {file.layer} are numbered {sorted(siblings)}, not from 0"
            )
        groups.setdefault((method, len(parameters["bias"]), file.component, len(siblings)), []).append(file)
    return groups


def _parse(file: Path) -> _File:
    match = FILE.fullmatch(file.name)
    if match is None:
        raise ValueError(f"{file} is no intervention on token positions of pyreft's")
    layer, component, number = match.groups()
    if layer is not None and component in COMPONENTS:
        return _File(file, int(layer), COMPONENTS[component], int(number))
    block = BLOCK_PATH.fullmatch(component)
    if layer is not None or block is None:
        raise ValueError(f"{file}: component '{component}' is none of {sorted(COMPONENTS)}, nor a block's output")
    return _File(file, int(block[1]), "output", int(number))


def _method_of(path: Path, given: str | None) -> str | None:
    """Return the method that is given or that the config names, None where nobody says. Raises ValueError for two."""
    if given is not None and given not in METHODS.values():
        raise ValueError(f"`method` (={given!r}) must be one of {sorted(METHODS.values())}, as pyreft names them")
    if not (path / "config.json").is_file():
        return given
    data = read_json(path / "config.json")
    _refuse_links(data, path)
    kinds = data.get("intervention_types")
    names = (
        {re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", str(kind)) for kind in kinds} if isinstance(kinds, list) else {""}
    )
    found = {METHODS.get(name) for name in names}
    if len(names) != 1 or None in found:
        raise ValueError(
            f"{path / 'config.json'} has interventions {sorted(names)}; one of {sorted(METHODS)} can be imported"
        )
    (method,) = found
    if given not in (None, method):
        raise ValueError(f"`method` (={given!r}) is not what {path / 'config.json'} says: '{method}'")
    return method


def _refuse_links(data: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError for interventions that are linked to others, or in an order that pyreft itself mixes up."""
    keys = data.get("sorted_keys")
    numbers = [str(key).rpartition("#")[2] for key in keys] if isinstance(keys, list) else []
    if numbers != sorted(numbers):
        raise ValueError(
            f"{path / 'config.json'}: prefix and suffix of a layer follow each other, where pyreft takes the first "
            "half of all interventions for the prefixes; which is which cannot be told"
        )
    representations = data.get("representations")
    links = [item[LINK] for item in representations or [] if isinstance(item, list) and len(item) > LINK]
    if any(link is not None for link in links):
        raise ValueError(f"{path / 'config.json'} links interventions to each other (`intervention_link_key`)")


def _method_by_names(tensors: Mapping[str, Tensor], file: Path) -> str:
    if {"weight", "bias", "rotate_layer"} == set(tensors):
        return "loreft"
    raise ValueError(
        f"{file.parent} has no config.json, and the numbers do not say which of pyreft's classes they are of: write "
        f"`method`, one of {sorted(METHODS.values())}"
    )


def _is_tied(positions: str, num_files: int, path: Path) -> bool:
    """Return whether one intervention acts at all positions; two are a prefix's and a suffix's."""
    parts = parse_positions(positions).parts
    if num_files == 1:
        return len(parts) > 1
    if num_files != 2 or [part[:1] for part in parts] != ["f", "l"]:
        raise ValueError(
            f"`positions` (={positions!r}): {path} has {num_files} interventions for a layer, a prefix's and a "
            "suffix's; write e.g. 'f7+l7'"
        )
    return False


def _modules_in(path: Path, model: nn.Module) -> dict[str, Tensor]:
    file = path / MODULES_NAME
    if not file.is_file():
        return {}
    max_bytes = 8 * sum(parameter.numel() for parameter in model.parameters()) + SLACK_BYTES
    return changed_modules(read_tensors(file, max_bytes), model, str(file))


# Parameters by method ------------------------------------------------------------------------------------------------

_SOURCE = ("learned_source.weight", "learned_source.bias")
_ROTATION = tuple(f"rotate_layer.parametrizations.weight.{name}" for name in ("original", "0.base"))


def _rotation(original_DR: Tensor, base_DD: Tensor, where: str) -> Tensor:
    return check_orthonormal(orthogonal_weight(original_DR, base_DD, where).mT, where)


def _loreft(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    rotation_DR, weight_RD, bias_R = take(tensors, ("rotate_layer", "weight", "bias"), where, SIZES)
    return {"rotation": check_orthonormal(rotation_DR.mT, where), "weight": weight_RD, "bias": bias_R}


def _direft(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    original_DR, base_DD, weight_RD, bias_R = take(tensors, (*_ROTATION, *_SOURCE), where, SIZES)
    return {"rotation": _rotation(original_DR, base_DD, where), "weight": weight_RD, "bias": bias_R}


def _noreft(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return V^T(act(Wh + b) - Vh - c) with one bias, b - c: they are one where there is no activation."""
    edit, second_R = _nodireft(tensors, where), tensors.get("proj_layer.bias")
    if second_R is None:
        return edit
    if second_R.shape != edit["bias"].shape:
        raise ValueError(f"{where}: its two biases differ in shape")
    return edit | {"bias": edit["bias"] - second_R}


def _nodireft(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return V^T act(Wh + b); pyreft has a second bias, which it never uses."""
    projection_RD, *source = take(tensors, ("proj_layer.weight", *_SOURCE), where, (*SIZES, "proj_layer.bias"))
    return {"projection": projection_RD, "weight": source[0], "bias": source[1]}


def _consreft(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    original_DR, base_DD, bias_R = take(tensors, (*_ROTATION, "learned_source"), where, SIZES)
    return {"rotation": _rotation(original_DR, base_DD, where), "bias": bias_R}


_PARAMETERS: dict[str, Callable[[Mapping[str, Tensor], str], dict[str, Tensor]]] = {
    "loreft": _loreft,
    "direft": _direft,
    "noreft": _noreft,
    "nodireft": _nodireft,
    "consreft": _consreft,
    "lobireft": _consreft,
}
