"""Keys and values of prefixes, taken out of a model's cache row by row, kept within a budget, and put into a new one.

Shape suffixes: B = rows, H = heads, W = columns of a cache, D = width of a head.
"""

import copy
import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vlreft.reuse.changes import Changes
from vlreft.reuse.pieces import split_arguments
from vlreft.reuse.stores import FolderStore, MemoryStore, Packed, Store, bytes_of

logger = logging.getLogger("vlreft")

# The keys and values of one row's prefix, layer after layer, each of shape (1, H, W, D); nothing of layers without any.
Row = list[Tensor]


class TooSmall(ValueError):  # noqa: N818 - says what is wrong, not that something is
    """The budget is less than a single prefix takes."""


class KeptPrefixes:
    """Keeps prefixes within a budget, least recently used first to go, known by their content.

    budget: bytes, or a text as "2GB". folder: keep them there, in safetensors files, instead of in host memory; they
    lie in a folder of their own inside of it, which goes with this object: another run may have another base. One
    object serves trainings one after the other on a base that stays in memory, whatever is edited behind the prefix.
    required: where prefixes cannot be kept, a trainer raises ValueError; else it says so in the log and keeps none.
    num_hits, num_misses: prefixes that were found, and that had to be run. Raises ValueError for a budget that is none,
    and for a folder that cannot be written to.
    """

    def __init__(self, budget: int | str, folder: str | Path | None = None, *, required: bool = True) -> None:
        self.required = required
        self.changes = Changes()
        try:
            self.budget = bytes_of(budget)
        except ValueError as error:
            raise ValueError(
                f"`keep_prefixes` (={budget!r}) must be a number of bytes, or a text such as '2GB' or '500 MiB'"
            ) from error
        self.num_hits = self.num_misses = 0
        self._has_said_size = self._has_said_too_large = False
        self.store: Store = MemoryStore(self.budget) if folder is None else self._in_folder(Path(folder))

    def _in_folder(self, folder: Path) -> FolderStore:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own = Path(tempfile.mkdtemp(prefix="prefixes-", dir=folder))
        except OSError as error:
            raise ValueError(f"`keep_prefixes_in` (={str(folder)!r}) cannot be written to: {error}") from error
        weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)
        return FolderStore(own, self.budget)

    @property
    def num_bytes(self) -> int:
        """Bytes in use."""
        return self.store.num_bytes()

    def get(self, key: str) -> Row | None:
        """Return the prefix of this content, on the CPU; None if it is not kept (any more)."""
        packed = self.store.get(key)
        self.num_hits += packed is not None
        self.num_misses += packed is None
        return None if packed is None else packed.tensors

    def put(self, key: str, row: Row) -> None:
        """Keep copies of a prefix's keys and values. Raises ValueError if the first one is larger than the budget."""
        with torch.inference_mode(False):
            packed = Packed("[]", [torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for t in row])
        size, fits = packed.num_bytes, self.store.put(key, packed)
        if not fits and not self._has_said_size:
            raise TooSmall(
                f"`keep_prefixes` (={self.budget} bytes) is less than a single prefix takes, {written(size)}: give it "
                "more, or leave it out"
            )
        if not self._has_said_size:
            num = self.budget // max(1, size)
            logger.info("a kept prefix takes %s; %s hold %d", written(size), written(self.budget), num)
            self._has_said_size = True
        if not fits and not self._has_said_too_large:
            logger.warning("a prefix of %s is larger than `keep_prefixes`, and not kept", written(size))
            self._has_said_too_large = True

    def drop(self) -> None:
        """Forget everything."""
        if isinstance(self.store, FolderStore):
            for path in self.store.folder.iterdir():
                path.unlink()
            self.store = FolderStore(self.store.folder, self.budget)
        else:
            self.store = MemoryStore(self.budget)


def written(num_bytes: int) -> str:
    """Return a number of bytes in words, as 2.3 MB."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes} bytes"


# A model's cache -----------------------------------------------------------------------------------------------------


def is_plain(cache: Cache | None) -> TypeGuard[Cache]:
    """Whether a cache holds keys and values of each token and nothing else."""
    return cache is not None and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def filled_layers(cache: Cache) -> list[DynamicLayer]:
    """Return a cache's layers that hold something. Raises ValueError if one holds more than keys and values."""
    filled = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(f"its cache holds more than each token's keys and values ({type(layer).__name__})")
        assert isinstance(layer, DynamicLayer)
        if layer.keys is not None:
            filled.append(layer)
    return filled


def select_rows(cache: Cache, rows_B: Tensor) -> None:
    """Make row b of a cache what its row rows_B[b] was; a view where all are one: layers grow by concatenation."""
    for layer in filled_layers(cache):
        assert layer.keys is not None
        assert layer.values is not None
        if len(layer.keys) == 1:
            num = len(rows_B)
            layer.keys, layer.values = layer.keys.expand(num, -1, -1, -1), layer.values.expand(num, -1, -1, -1)
        else:
            layer.keys, layer.values = layer.keys.index_select(0, rows_B), layer.values.index_select(0, rows_B)


def rows_of(cache: Cache, num_tokens: Sequence[int]) -> list[Row]:
    """Return views of each row's last tokens: as many as its prefix has, fewer where a sliding window held fewer."""
    rows: list[Row] = [[] for _ in num_tokens]
    for layer in filled_layers(cache):
        for states_BHWD in (layer.keys, layer.values):
            assert states_BHWD is not None
            width = states_BHWD.shape[-2]
            for place, num in enumerate(num_tokens):
                rows[place].append(states_BHWD[place : place + 1, :, max(0, width - num) :])
    return rows


def shell_of(cache: Cache) -> Cache:
    """Return a copy of a cache without what it holds; the shapes stay, and say what an empty row has."""
    shell = _copy(cache)
    for layer in filled_layers(shell):
        assert layer.keys is not None
        assert layer.values is not None
        layer.keys, layer.values = layer.keys[:0, :, :0].clone(), layer.values[:0, :, :0].clone()
    return shell


def cache_of(shell: Cache, rows: Sequence[Row | None], width: int) -> Cache:
    """Return a cache of `width` columns with a prefix a row, each at the end of its row; None for a row without one."""
    cache, place = _copy(shell), 0
    for layer in filled_layers(cache):
        held = width
        if isinstance(layer, DynamicSlidingWindowLayer):
            held, layer.cumulative_length = min(width, layer.sliding_window - 1), width
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        layer.keys = _stacked([None if row is None else row[place] for row in rows], held, keys)
        layer.values = _stacked([None if row is None else row[place + 1] for row in rows], held, values)
        place += 2
    return cache


def _copy(cache: Cache) -> Cache:
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made


def _stacked(parts: Sequence[Tensor | None], width: int, like: Tensor) -> Tensor:
    """Return parts_BHWD, each with zeros in front up to a width."""
    on_device: dict[int, Tensor] = {}
    for part in parts:
        if part is not None and id(part) not in on_device:
            moved = part.to(like.device, like.dtype)
            missing = width - moved.shape[-2]
            on_device[id(part)] = F.pad(moved, (0, 0, missing, 0)) if missing else moved
    if None not in parts and len(on_device) == 1:
        return next(iter(on_device.values())).expand(len(parts), -1, -1, -1)
    empty = like.new_zeros((1, like.shape[1], width, like.shape[-1])) if None in parts else like
    return torch.cat([empty if part is None else on_device[id(part)] for part in parts])


# A batch's pictures --------------------------------------------------------------------------------------------------


def media_of_rows(media: Mapping[str, Any], num_tokens: Sequence[int]) -> list[list[dict[str, Any]]] | None:
    """Return the arguments of each row's pictures, picture by picture, given each row's number of image tokens.

    None where they cannot be told apart. Rows with images have one each, or they share them by the number of their
    tokens, which follows the number of pixels.
    """
    if not all(isinstance(value, Tensor | bool | int | float | str | None) for value in media.values()):
        return None
    rows: list[list[dict[str, Any]]] = [[] for _ in num_tokens]
    with_images = [row for row, num in enumerate(num_tokens) if num]
    if not any(isinstance(value, Tensor) for value in media.values()):
        return rows
    parts = split_arguments(media)
    if len(parts) == len(with_images):
        for row, part in zip(with_images, parts, strict=True):
            rows[row] = [part]
        return rows
    if len(parts) == 1:
        return None
    pixels = [next(v for v in part.values() if isinstance(v, Tensor) and v.is_floating_point()) for part in parts]
    is_one_size = len({num_tokens[row] for row in with_images}) == 1
    if len(parts) == len(rows) and (pixels[0].dim() > 4 or is_one_size):
        return None  # perhaps one a row, rows without images too
    sizes = [len(pixels_of_one) for pixels_of_one in pixels]
    place, total = 0, sum(sizes)
    for row in with_images:
        left = num_tokens[row] * total
        while left > 0 and place < len(parts):
            left -= sizes[place] * sum(num_tokens)
            rows[row].append(parts[place])
            place += 1
        if left:
            return None
    return rows if place == len(parts) else None
