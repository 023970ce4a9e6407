"""The checkpoint on disk: `reft_config.json`, `reft_model.safetensors`, a model card; read strictly, as data only."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlreft.config import ReftConfig
from vlreft.models.sites import Sites
from vlreft.plan import Entry
from vlreft.saving.card import MODULES_PREFIX, OPEN_CLIP, Card, Metrics
from vlreft.saving.shards import fill

logger = logging.getLogger("vlreft")

CONFIG_NAME = "reft_config.json"
WEIGHTS_NAME = "reft_model.safetensors"
CARD_NAME = "README.md"
# What is read before it is known to make sense: an adapter of thousands of edits needs a tenth of either.
MAX_CONFIG_BYTES = 4_000_000
MAX_HEADER_BYTES = 10_000_000
MAX_NAMED = 8  # tensors that an error names


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
    """What is written to a checkpoint folder."""

    config: ReftConfig
    base: Base
    tensors: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Weights:
    """A weights file as its header declares it; the header was checked against the file's size, no tensor was read.

    declared maps a tensor's name to its shape and safetensors' name of its dtype. sha256 is what the config says of the
    file, None where it says nothing (files of before it did).
    """

    path: Path
    declared: dict[str, tuple[tuple[int, ...], str]]
    sha256: str | None

    def check(self) -> None:
        """Raise ValueError if the file is not the one that the config was saved with."""
        if self.sha256 is not None and _sha256(self.path) != self.sha256:
            raise ValueError(
                f"{self.path} is not the file that {CONFIG_NAME} beside it was saved with (its sha256 differs): take "
                "both from the same save, or remove 'weights' from the config if the numbers were changed on purpose"
            )

    def read(self) -> dict[str, Tensor]:
        """Read the tensors, after `check`."""
        self.check()
        try:
            with safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in self.declared}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a whole safetensors file: {error}") from error


@dataclass(frozen=True, eq=False)
class Stored:
    """What a checkpoint folder holds: its config, its base, and what its weights file declares."""

    config: ReftConfig
    base: Base
    tensors: Weights


def write_checkpoint(folder: str | os.PathLike[str], checkpoint: Checkpoint, metrics: Metrics | None = None) -> None:
    """Write the three files, or leave those that are there, whenever the process ends. Tensors are stored in float32.

    metrics: for the card. Raises OSError naming the folder and the bytes that are needed, e.g. where the disk is full.
    """
    path = Path(folder)
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in checkpoint.tensors.items()}
    weights = save(tensors, metadata={"format": "pt"})
    data = checkpoint.config.to_dict() | {"base": asdict(checkpoint.base)}
    data["weights"] = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    card = Card(checkpoint.config, **asdict(checkpoint.base), tensors=checkpoint.tensors, metrics=metrics)
    files = {
        CONFIG_NAME: json.dumps(data, indent=2).encode(),
        WEIGHTS_NAME: weights,
        CARD_NAME: str(card).encode(),
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        _finish(path)
        _replace(path, files)
    except OSError as error:
        num_bytes = sum(map(len, files.values()))
        raise OSError(
            error.errno,
            f"the adapter cannot be saved in {path}: {error.strerror or error}; it needs {num_bytes:,} bytes"
            f"{free_space(path)}; an adapter that was there can still be read",
        ) from error


def free_space(path: Path) -> str:
    """Return ", 1,234 are free" for where a path is or would be; nothing where the system does not say."""
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            return f", {shutil.disk_usage(folder).free:,} are free"
    return ""


def read_checkpoint(folder: str | os.PathLike[str]) -> Stored:
    """Read a checkpoint folder, of its weights the header alone.

    Raises ValueError naming the file that is missing, broken, too large to be one, or of another format.
    """
    path = Path(folder)
    data = _read_config(path / CONFIG_NAME)
    base_data, sha256, num_bytes = data.pop("base", None), *_weights_in(path, data.pop("weights", None))
    try:
        config = ReftConfig.from_dict(data)
        base = Base(**base_data) if isinstance(base_data, dict) else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG_NAME} is not a vlreft config: {error}") from error
    if base is None:
        raise ValueError(f"{path / CONFIG_NAME} does not say which base it is for: it has no 'base'")
    weights = path / WEIGHTS_NAME
    if _is_file(_temporary(weights), sha256, num_bytes):
        weights = _temporary(weights)
    return Stored(config, base, Weights(weights, _read_header(weights), sha256))


def describe_base(model: nn.Module, sites: Sites) -> Base:
    """Return what identifies a model as the base of an adapter."""
    shape = {name: [len(site.blocks), site.width] for name, site in sites.by_name.items()}
    if not isinstance(model, PreTrainedModel):
        return Base(OPEN_CLIP, type(model).__name__, "", shape)
    name = type(model).__name__.removeprefix("FSDP")  # FSDP2 makes a class of its own of a model's
    return Base(model.config.model_type, name, model.config.name_or_path or "", shape)


def check_base(saved: Base, actual: Base, folder: str | os.PathLike[str]) -> None:
    """Raise ValueError, naming both, if an adapter was made for a base of another type or shape.

    Of the same shape under another name: a warning in the log, as its weights may be others.
    """
    if (saved.model_type, saved.sites) != (actual.model_type, actual.sites):
        raise ValueError(f"the adapter in {folder} was made for another base: for {saved}, not for {actual}")
    names = (saved.name_or_path, actual.name_or_path)
    if all(names) and names[0] != names[1]:
        logger.warning(
            "the adapter in %s was made for '%s', this is '%s' of the same shape: it fits only if the weights are the "
            "same ones",
            *(folder, *names),
        )


def check_plan(stored: Stored, plan: Iterable[Entry], folder: str | os.PathLike[str]) -> None:
    """Raise ValueError if a weights file does not declare the numbers of its config on this base; none are made."""
    declared, made = stored.tensors.declared, dict[tuple[int, int], dict[str, tuple[int, ...]]]()
    wanted: dict[str, tuple[int, ...]] = {}
    for entry in plan:
        width = entry.target.width if entry.span is None else entry.span[1] - entry.span[0]
        kind = (entry.number, width)
        if kind not in made:
            with torch.device("meta"):
                made[kind] = {name: tuple(p.shape) for name, p in entry.item.build(width).named_parameters()}
        wanted |= {f"{entry.key}.{name}": shape for name, shape in made[kind].items()}
    edits = {name: what for name, what in declared.items() if not name.startswith(MODULES_PREFIX)}
    _refuse_misfits(edits, wanted, f"the checkpoint in {folder}")


def copy_tensors(tensors: Mapping[str, Tensor] | Weights, parameters: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters of the same names, in place, so that optimisers keep their parameters.

    Raises ValueError listing missing, surplus and misshapen tensors; then nothing was copied, nor read from a file.
    """
    if isinstance(tensors, Weights):
        declared = tensors.declared
    else:
        declared = {name: (tuple(t.shape), _NAMES.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}
    _refuse_misfits(declared, {name: tuple(p.shape) for name, p in parameters.items()}, source)
    values = tensors.read() if isinstance(tensors, Weights) else tensors
    with torch.no_grad():
        for name, parameter in parameters.items():
            fill(parameter, values[name])


# safetensors' names of dtypes, for errors.
_NAMES = {
    **{torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}
_DTYPES = {name: str(dtype) for dtype, name in _NAMES.items()}


def _refuse_misfits(
    declared: Mapping[str, tuple[tuple[int, ...], str]], wanted: Mapping[str, tuple[int, ...]], source: str
) -> None:
    missing, surplus = sorted(set(wanted) - set(declared)), sorted(set(declared) - set(wanted))
    problems = [f"missing {_listed(missing)}"] * bool(missing) + [f"surplus {_listed(surplus)}"] * bool(surplus)
    for name in sorted(set(declared) & set(wanted)):
        shape, dtype = declared[name]
        if shape != wanted[name]:
            by = "in the base" if name.startswith(MODULES_PREFIX) else "by its config"
            problems.append(f"'{name}' has shape {shape} in the file and {wanted[name]} {by}")
        elif dtype != "F32":
            problems.append(f"'{name}' is {_DTYPES.get(dtype, dtype)} in the file, it must be torch.float32")
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise ValueError(f"{source} does not fit its config: {'; '.join(problems[:MAX_NAMED])}{more}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{names[:MAX_NAMED]}{more}"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no vlreft checkpoint in {path.parent}: there is no {path.name}")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a config's size. Raises ValueError for anything else."""
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, too many for a config (at most {MAX_CONFIG_BYTES:,})")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _weights_in(folder: Path, data: object) -> tuple[str | None, int | None]:
    """Return what a config says of its weights file, its hash and size; None where it says nothing."""
    if data is None:
        return None, None
    if isinstance(data, dict) and data.keys() == {"bytes", "sha256"}:
        sha256, num_bytes = data["sha256"], data["bytes"]
        if isinstance(sha256, str) and type(num_bytes) is int:
            return sha256, num_bytes
    raise ValueError(f"{folder / CONFIG_NAME}: 'weights' must hold 'bytes' and 'sha256', got {data!r}"[:500])


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return each tensor's shape and dtype. safetensors holds the shapes against the file's size, and its gaps."""
    if not path.is_file():
        raise ValueError(f"no weights in {path.parent}: there is no {path.name}")
    try:
        with path.open("rb") as file:
            if (size := int.from_bytes(file.read(8), "little")) > MAX_HEADER_BYTES:
                raise ValueError(
                    f"{path} is not a whole safetensors file of an adapter: its header has {size:,} bytes, more than "
                    f"{MAX_HEADER_BYTES:,}"
                )
        with safe_open(path, framework="np") as file:  # "pt" would map all of it a second time
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _is_file(path: Path, sha256: str | None, num_bytes: int | None) -> bool:
    return sha256 is not None and path.is_file() and path.stat().st_size == num_bytes and _sha256(path) == sha256


def _finish(folder: Path) -> None:
    """Rename the weights of a save that ended between its renames, before their temporary name is used again."""
    pending = _temporary(folder / WEIGHTS_NAME)
    try:
        sha256, num_bytes = _weights_in(folder, _read_config(folder / CONFIG_NAME).get("weights"))
    except ValueError:
        return  # no config that can be read: there is nothing to keep
    if _is_file(pending, sha256, num_bytes):
        pending.replace(folder / WEIGHTS_NAME)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files next to their targets, flush them to disk, and only then rename them over, in their order.

    The first rename, the config's, decides: from then on the weights that it was saved with are read, under their
    temporary name if the process ended before they were renamed too.
    """
    temporaries = {name: _temporary(folder / name) for name in files}
    is_decided = False
    try:
        for name, content in files.items():
            with temporaries[name].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            temporary.replace(folder / name)
            is_decided = True
    finally:
        if not is_decided:
            for temporary in temporaries.values():
                temporary.unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk: a rename is there after a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
