"""The checkpoint on disk: `reft_config.json`, `reft_model.safetensors`, a model card; read strictly, as data only."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlreft.config import ReftConfig

CONFIG_NAME = "reft_config.json"
WEIGHTS_NAME = "reft_model.safetensors"
CARD_NAME = "README.md"
# Tensors of modules that are trained whole: `modules_to_save.<name>.<parameter>`, the name with "/" for ".".
MODULES_PREFIX = "modules_to_save."


@dataclass(frozen=True)
class Base:
    """What identifies the base model an adapter was made for: its type and the shape of its sites.

    sites maps a site's name to [number of blocks, width]. name_or_path is for people; it is not compared.
    """

    model_type: str
    class_name: str
    name_or_path: str
    sites: dict[str, list[int]]

    def __post_init__(self) -> None:
        """Raise ValueError for fields of other types, which a file may hold."""
        names = (self.model_type, self.class_name, self.name_or_path)
        shapes = list(self.sites.values()) if isinstance(self.sites, dict) else [None]
        are_pairs = all(isinstance(shape, list) and [type(item) for item in shape] == [int, int] for shape in shapes)
        if not are_pairs or not all(isinstance(name, str) for name in names):
            raise ValueError(f"'base' must hold three names and [number of blocks, width] of each site, got {self!r}")

    def __str__(self) -> str:
        """Name the base and its shape."""
        shape = ", ".join(f"{site} {blocks} x {width}" for site, (blocks, width) in self.sites.items())
        return f"{self.name_or_path or self.class_name} ({self.model_type}: {shape})"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint folder holds."""

    config: ReftConfig
    base: Base
    tensors: dict[str, Tensor]


def write_checkpoint(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write the three files, or leave those that are there. Tensors are stored in float32."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in checkpoint.tensors.items()}
    data = checkpoint.config.to_dict() | {"base": asdict(checkpoint.base)}
    files = {
        WEIGHTS_NAME: save(tensors, metadata={"format": "pt"}),
        CONFIG_NAME: json.dumps(data, indent=2).encode(),
        CARD_NAME: _card(checkpoint).encode(),
    }
    _replace(path, files)


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint folder. Raises ValueError naming the file that is missing, broken or of another format."""
    path = Path(folder)
    data = _read_config(path / CONFIG_NAME)
    base_data = data.pop("base", None)
    try:
        config = ReftConfig.from_dict(data)
        base = Base(**base_data) if isinstance(base_data, dict) else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG_NAME} is not a vlreft config: {error}") from error
    if base is None:
        raise ValueError(f"{path / CONFIG_NAME} does not say which base it is for: it has no 'base'")
    return Checkpoint(config, base, _read_tensors(path / WEIGHTS_NAME))


def check_base(saved: Base, actual: Base, folder: str | os.PathLike[str]) -> None:
    """Raise ValueError, naming both, if an adapter was made for a base of another type or shape."""
    if (saved.model_type, saved.sites) != (actual.model_type, actual.sites):
        raise ValueError(f"the adapter in {folder} was made for another base: for {saved}, not for {actual}")


def copy_tensors(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters of the same names, in place, so that optimisers keep their parameters.

    Raises ValueError listing missing, surplus and misshapen tensors; then nothing was copied.
    """
    missing, surplus = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    problems = [f"missing {missing}"] * bool(missing) + [f"surplus {surplus}"] * bool(surplus)
    for name in sorted(set(tensors) & set(parameters)):
        if tensors[name].shape != parameters[name].shape:
            wanted, got = tuple(parameters[name].shape), tuple(tensors[name].shape)
            by = "in the base" if name.startswith(MODULES_PREFIX) else "by its config"
            problems.append(f"'{name}' has shape {got} in the file and {wanted} {by}")
        elif tensors[name].dtype != torch.float32:
            problems.append(f"'{name}' is {tensors[name].dtype} in the file, it must be torch.float32")
    if problems:
        raise ValueError(f"{source} does not fit its config: {'; '.join(problems)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no vlreft checkpoint in {path.parent}: there is no {path.name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no weights in {path.parent}: there is no {path.name}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files next to their targets, flush them to disk, and only then rename them over."""
    temporaries = {name: folder / f".{name}.tmp" for name in files}
    try:
        for name, content in files.items():
            with temporaries[name].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            temporary.replace(folder / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _card(checkpoint: Checkpoint) -> str:
    base, tensors = checkpoint.base, checkpoint.tensors
    rows = "\n".join(
        f"| {item.method} | {item.site} | {item.layers} | `{item.positions}` | {item.rank} | {item.tied} |"
        for item in checkpoint.config.interventions
    )
    edits = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith(MODULES_PREFIX))
    modules = ""
    for name in checkpoint.config.modules_to_save:
        prefix = f"{MODULES_PREFIX}{name.replace('.', '/')}."
        num_here = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith(prefix))
        modules += f"\nBeside them, `{name}` was trained whole: {num_here:,} numbers.\n"
    return f"""---
library_name: vlreft
base_model: {base.name_or_path or base.class_name}
tags: [reft, representation-finetuning]
---

# A vlreft adapter

Interventions on the hidden states of a frozen {base.class_name}; {edits:,} numbers were trained.
{modules}
| method | site | layers | positions | rank | tied |
|---|---|---|---|---|---|
{rows}

```python
import vlreft

reft = vlreft.load(model, "path/to/this/folder")  # model: the frozen base, a {base.class_name}
```
"""
