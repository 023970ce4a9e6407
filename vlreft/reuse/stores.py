"""Where the features of pictures are kept: in memory, or in a folder that several processes share.

Both hold a `Packed` under a key, stay within a budget of bytes, and drop what was not asked for the longest.
"""

import json
import os
import re
import secrets
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
SUFFIX = ".safetensors"
# After this part of the budget was written, a process looks again at what others have put into the folder.
LOOK_AFTER = 1 / 32
# What eviction leaves of the budget, so that not every new picture has to look through the folder.
LEFT = 0.9
ABANDONED = 3600.0  # seconds after which a file that was never finished is taken for that of a dead process


class Packed(NamedTuple):
    """A tree of tensors, flat: `form` is JSON in which tensors are numbers, the places in `tensors` (on the CPU)."""

    form: str
    tensors: list[Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Store(Protocol):
    """What `FeatureCache` asks of a place to keep things in."""

    def get(self, key: str) -> Packed | None:
        """Return what was put there, None if there is nothing (any more)."""
        ...

    def put(self, key: str, packed: Packed) -> bool:
        """Keep it, dropping others if need be; return whether it fits into the budget at all."""
        ...

    def num_bytes(self) -> int:
        """Count the bytes in use."""
        ...


class MemoryStore:
    """Keeps features in host memory."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.kept: OrderedDict[str, Packed] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: str) -> Packed | None:
        """Return what was put there, None if there is nothing (any more)."""
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def put(self, key: str, packed: Packed) -> bool:
        """Keep it, dropping others if need be; return whether it fits into the budget at all."""
        if packed.num_bytes > self.budget:
            return False
        if (before := self.kept.pop(key, None)) is not None:
            self._num_bytes -= before.num_bytes
        self.kept[key] = packed
        self._num_bytes += packed.num_bytes
        while self._num_bytes > self.budget:
            self._num_bytes -= self.kept.popitem(last=False)[1].num_bytes
        return True

    def num_bytes(self) -> int:
        """Count the bytes in use."""
        return self._num_bytes


class FolderStore:
    """Keeps features in safetensors files, a file a picture, named by their key; processes may share the folder.

    A file appears whole or not at all, and whoever finds one may use it: its name says what it was computed from. Each
    process keeps the budget to within 1/32 of it and a file.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.budget = budget
        self._until_look = 0

    def get(self, key: str) -> Packed | None:
        """Return what was put there, None if there is nothing (any more). Raises ValueError for a damaged file."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                form = (file.metadata() or {}).get("form", "")
                tensors = [file.get_tensor(str(place)) for place in range(len(file.keys()))]
            json.loads(form)
        except FileNotFoundError:
            return None
        except RuntimeError:  # torch opens it once more by its name: another process may have dropped it in between
            if path.exists():
                raise
            return None
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no whole file of features ({error}); delete it") from error
        with suppress(FileNotFoundError):  # another process may have dropped it
            os.utime(path)
        return Packed(form, tensors)

    def put(self, key: str, packed: Packed) -> bool:
        """Keep it, dropping others if need be; return whether it fits into the budget at all."""
        if packed.num_bytes > self.budget:
            return False
        path = self._path(key)
        if path.exists():
            return True
        content = save({str(i): tensor for i, tensor in enumerate(packed.tensors)}, metadata={"form": packed.form})
        unfinished = self.folder / f"{key}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._until_look -= len(content)
        if self._until_look < 0:
            self._look()
        return True

    def num_bytes(self) -> int:
        """Count the bytes in use, by all processes."""
        return sum(size for _, size, _ in self._files())

    def _look(self) -> None:
        """Drop the files that were used the longest ago if there is too much, and what dead processes left."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total > self.budget:
            for _, size, path in files[:-1]:
                if total <= LEFT * self.budget:
                    break
                path.unlink(missing_ok=True)
                total -= size
        for path in self.folder.glob("*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        self._until_look = min(max(0, self.budget - total), int(LOOK_AFTER * self.budget))

    def _files(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def bytes_of(budget: int | str) -> int:
    """Return a budget in bytes: a number of them, or a text as "2GB" (10^9) or "500 MiB" (2^20). Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(budget).upper())
    num_bytes = 0 if match is None or match[2] not in UNITS else int(float(match[1]) * UNITS[match[2]])
    if num_bytes < 1 or isinstance(budget, bool):
        raise ValueError(f"`budget` (={budget!r}) must be a number of bytes, or a text such as '2GB' or '500 MiB'")
    return num_bytes
