"""What importing adapters of other libraries shares: files read as tensors alone, orthonormal rows, put on a model.

Shape suffixes: D = hidden width, R = rank.
"""

import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlreft.attaching import attach
from vlreft.config import ReftConfig
from vlreft.models.sites import Sites, find_sites
from vlreft.plan import plan_edits
from vlreft.reft import Reft, find_adapters
from vlreft.saving.card import MODULES_PREFIX
from vlreft.saving.checkpoint import MAX_NAMED, copy_tensors

MAX_PICKLE_BYTES = 10_000_000  # of names and shapes, beside the numbers
SLACK_BYTES = 2_000_000  # what a file may hold beside the numbers of its edits
# What torch's reader of plain tensors says to a file that holds more, or is broken.
_BROKEN = (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True, eq=False)
class Foreign:
    """What a folder of another library holds, in ours: `edits` maps (intervention's number, layer, part) to parameters.

    modules: of modules of the base that were trained whole, by their parameters' names in the base.
    """

    config: ReftConfig
    edits: dict[tuple[int, int, int], dict[str, Tensor]]
    modules: dict[str, Tensor]
    source: str


def sites_of(model: nn.Module) -> Sites:
    """Return the sites of a model, with or without adapters on it."""
    adapters = find_adapters(model)
    return find_sites(model) if adapters is None else adapters.runtime.sites


def put_on(model: nn.Module, found: Foreign, name: str) -> Reft:
    """Attach what was found. Raises ValueError if it does not fit the model, which is then as it was."""
    names = tuple(dict.fromkeys(path.split(".")[0] for path in found.modules))
    config = ReftConfig(found.config.interventions, names)
    tensors = {f"{MODULES_PREFIX}{path}": tensor.float() for path, tensor in found.modules.items()}
    for entry in plan_edits(config, sites_of(model)):
        edit = found.edits[entry.number, entry.layer, entry.part or 0]
        tensors |= {f"{entry.key}.{parameter}": tensor.float() for parameter, tensor in edit.items()}
    with torch.random.fork_rng(devices=[]):  # the start values are thrown away
        reft = attach(model, config, name)
    adapters = find_adapters(model)
    assert adapters is not None
    try:
        copy_tensors(tensors, dict(adapters[name].named_parameters()), found.source)
    except ValueError:
        reft.detach()
        raise
    return reft


def changed_modules(tensors: Mapping[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Return the tensors if they are other numbers than the base's, nothing if they are the same.

    Raises ValueError for names that the base does not have.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    if unknown := sorted(set(tensors) - set(own)):
        raise ValueError(
            f"{source} holds {unknown[:MAX_NAMED]}, which {type(model).__name__} has no parameters for; write "
            "head=False to leave them out"
        )
    same = [not own[name].is_meta and torch.equal(own[name].cpu().float(), t.float()) for name, t in tensors.items()]
    return {} if all(same) else dict(tensors)


# Files ---------------------------------------------------------------------------------------------------------------


def read_tensors(path: Path, max_bytes: int) -> dict[str, Tensor]:
    """Read a file of safetensors' or torch's own as tensors by name; nothing in it is run.

    max_bytes: what there can be of edits of this base. Raises ValueError for a file that is larger, broken, of torch
    before 1.6, or that holds anything else.
    """
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes, more than edits of this base can have ({max_bytes:,})")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold tensors by name, got {type(loaded).__name__}")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path} must hold tensors by name, got {type(tensor).__name__} as {str(name)[:100]!r}")
        if tensor.numel() * tensor.element_size() > size or tensor.is_complex() or tensor.is_quantized:
            raise ValueError(
                f"{path}: '{name}' cannot be the {tensor.dtype} of {tuple(tensor.shape)} that it says it is"
            )
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _read_archive(path: Path) -> object:
    """Read what `torch.save` wrote, a zip archive of numbers and a pickle of their names, the pickle as data alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no archive of torch.save ({error}); of torch before 1.6: save it again with a newer one"
        ) from error
    pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if pickled > MAX_PICKLE_BYTES or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} is no archive of torch.save: it is compressed, or names more than an adapter can")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*_BROKEN, struct.error) as error:
        problem = (
            "holds more than tensors, of which nothing was run" if isinstance(error, UnpicklingError) else "is broken"
        )
        raise ValueError(f"{path} {problem}; take it from whom you trust, or ask for safetensors") from error


# Numbers -------------------------------------------------------------------------------------------------------------


def take(tensors: Mapping[str, Tensor], names: Iterable[str], where: str, beside: Iterable[str] = ()) -> list[Tensor]:
    """Return some tensors: vectors where the name says that it is a bias, matrices elsewhere.

    Raises ValueError for one that is missing or of another kind, and for others than these and those `beside`.
    """
    names = list(names)
    missing, surplus = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names) - set(beside))
    if missing or surplus:
        raise ValueError(f"{where} holds other tensors: missing {missing[:MAX_NAMED]}, surplus {surplus[:MAX_NAMED]}")
    for name in names:
        num_axes = 1 if name.endswith(("bias", "learned_source")) else 2
        if tensors[name].ndim != num_axes or not tensors[name].is_floating_point():
            raise ValueError(f"{where}: '{name}' is {tensors[name].dtype} of {tuple(tensors[name].shape)}")
    return [tensors[name] for name in names]


def orthogonal_weight(original: Tensor, base_NN: Tensor, where: str) -> Tensor:
    """Return the weight that torch's `parametrizations.orthogonal` makes of the two tensors that it holds.

    Shapes: the weight's own, (R, D) or (D, R), and N the larger of its sides. Stood upright, it is the first columns of
    `base @ H_1 ... H_R`, reflections along the columns of what is below the diagonal of `original` (with ones on it),
    times the signs on the diagonal; a square one is base @ exp(L - L^T), L the lower triangle. Raises ValueError for
    other shapes.
    """
    is_wide = original.shape[0] < original.shape[1]
    upright_NR = (original.mT if is_wide else original).double()
    num_rows, rank = upright_NR.shape
    if base_NN.shape != (num_rows, num_rows):
        raise ValueError(f"{where}: an orthogonal weight of {tuple(original.shape)} with {tuple(base_NN.shape)}")
    if rank == num_rows:
        lower_NN = upright_NR.tril()
        turned_NR = torch.matrix_exp(lower_NN - lower_NN.mT)
    else:
        below_NR = upright_NR.tril(-1)
        turned_NR = torch.linalg.householder_product(below_NR, 2.0 / (1.0 + below_NR.square().sum(0)))
        turned_NR = turned_NR * upright_NR.diagonal().trunc()
    weight_NR = (base_NN.double() @ turned_NR).to(original.dtype)
    return weight_NR.mT if is_wide else weight_NR


def check_orthonormal(r_RD: Tensor, where: str) -> Tensor:
    """Return R. Raises ValueError if its rows are not orthonormal, up to what its dtype can say."""
    if r_RD.shape[0] > r_RD.shape[1]:
        raise ValueError(f"{where}: R of {tuple(r_RD.shape)} cannot have orthonormal rows")
    wide_RD = r_RD.double()
    off = float((wide_RD @ wide_RD.mT - torch.eye(len(wide_RD), dtype=torch.float64)).abs().max())
    if not off <= (1e-4 if r_RD.dtype.itemsize >= 4 else 2e-2):
        raise ValueError(
            f"{where}: the rows of R are not orthonormal (off by {off:.3g}), so it is not the edit that it is named "
            "after; weight decay does that to the library's parametrization and stops the edit: train it again without"
        )
    return r_RD
