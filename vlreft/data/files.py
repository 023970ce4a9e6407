"""Reads data files row by row: JSON of any size, JSON lines, tables, and the pictures that they name.

Nothing is held but the row at hand, so memory does not follow the size of a file. What is wrong in a file is a
ValueError that names file and row.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]
Located = tuple[str, Row]  # how errors call the row, and the row
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
CACHE_VERSION = 1  # of what this file makes; a new one leaves the caches of old ones behind


def json_rows(file: Path, key: str = "") -> Iterator[Located]:
    """Read the objects of a list: the file's only value, or what stands under `key` (dots for keys in keys)."""
    import ijson

    number = -1
    for number, row in enumerate(_parsed(file, ijson.items, f"{key}.item" if key else "item")):
        where = f"{file}, {key + ' ' if key else ''}row {number}"
        yield where, mapping(row, where)
    if number < 0 and not _is_list(file, key):
        raise ValueError(f"{file}: has no list {f'under {key!r}' if key else 'of rows'}; fetch it anew.")


def json_pairs(file: Path, key: str = "") -> Iterator[tuple[str, str, Row]]:
    """Read the objects of an object, each with where it stands and its name: `{"101": {...}, "102": {...}}`."""
    import ijson

    for name, row in _parsed(file, ijson.kvitems, key):
        where = f"{file}, {key + ' ' if key else ''}{name!r}"
        yield where, name, mapping(row, where)


def json_lines(file: Path) -> Iterator[Located]:
    """Read a JSON object a line; empty lines are left out."""
    for number, line in _lines(file):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: is not JSON ({error}); mend it or fetch it anew.") from error
            yield where, mapping(row, where)


def table_rows(file: Path, *, delimiter: str = "\t", quoted: bool = False) -> Iterator[Located]:
    """Read a table whose first line names the columns; `quoted` is for CSV, whose cells may hold the delimiter."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, quoting=quoting)
    names: list[str] | None = None
    for cells in reader:
        if names is None:
            names = cells
            continue
        where = f"{file}, line {reader.line_num}"
        if len(cells) != len(names):
            raise ValueError(f"{where}: has {len(cells)} cells, the first line names {len(names)}; mend it.")
        yield where, dict(zip(names, cells, strict=True))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from enumerate(lines, 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); give a file in UTF-8.") from error


def _parsed(file: Path, parse: Callable[..., Iterable[Any]], prefix: str) -> Iterator[Any]:
    import ijson

    try:
        with file.open("rb") as opened:
            yield from parse(opened, prefix, use_float=True)
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: is not JSON in UTF-8 ({reason}); mend it or fetch it anew.") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error}); give a JSON file in UTF-8.") from error


def _is_list(file: Path, key: str) -> bool:
    import ijson

    def events(opened: Any, _: str, use_float: bool) -> Iterable[Any]:
        return ijson.parse(opened, use_float=use_float)

    return any((prefix, event) == (key, "start_array") for prefix, event, _ in _parsed(file, events, key))


# Values --------------------------------------------------------------------------------------------------------------


def mapping(value: Any, where: str) -> Row:
    """Return the value if it is an object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: got a {type(value).__name__} where a JSON object is expected.")
    return value


def value(row: Row, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return `row[key]` if it is there and of this kind."""
    if key not in row:
        raise ValueError(f"{where}: has no {key!r}, only {sorted(row)}; add it.")
    # JSON's true and false are ints to Python.
    is_flag = isinstance(row[key], bool) and kind is not bool
    if not isinstance(row[key], kind) or is_flag:
        raise ValueError(f"{where}: {key!r} (={row[key]!r}) has the wrong type {type(row[key]).__name__}.")
    return row[key]


def text(row: Row, key: str, where: str) -> str:
    """Return `row[key]` if it is a text with something in it."""
    found = value(row, key, str, where)
    if not found.strip():
        raise ValueError(f"{where}: {key!r} is empty; fill it in or drop the row.")
    return found


def add(table: dict, key: Any, entry: Any, where: str) -> None:
    """Put an entry into the table. Raises ValueError if its key is there already."""
    if key in table:
        raise ValueError(f"{where}: the id {key} is there a second time; ids must be unique.")
    table[key] = entry


def paired(
    left: Iterable[Located], right: Iterable[Located], key: str, kind: type | tuple[type, ...], names: tuple[str, str]
) -> Iterator[tuple[Located, Located]]:
    """Join two files on an id, in the left one's order; only as much of the right one is held as runs ahead.

    names: what errors call a row of each, as ("question", "annotation").
    """
    ahead: dict[Any, Located] = {}
    rest = _with_ids(right, key, kind)
    for name, located in _with_ids(left, key, kind):
        while name not in ahead:
            other = next(rest, None)
            if other is None:
                raise ValueError(f"{located[0]}: {names[0]} {name} has no {names[1]}; add it.")
            ahead[other[0]] = other[1]
        yield located, ahead.pop(name)
    ahead |= rest
    for name, (where, _) in ahead.items():
        raise ValueError(f"{where}: {names[1]} {name} has no {names[0]}; remove it.")


def _with_ids(rows: Iterable[Located], key: str, kind: type | tuple[type, ...]) -> Iterator[tuple[Any, Located]]:
    """The rows with their ids, which are unique and of one type."""
    seen: dict[Any, None] = {}
    for where, row in rows:
        name = value(row, key, kind, where)
        if seen and type(name) is not type(next(iter(seen))):
            raise ValueError(f"{where}: {key!r} (={name!r}) is of another type than in the rows before; mend it.")
        add(seen, name, None, where)
        yield name, (where, row)


def find_file(folder: Path, *names: str) -> Path:
    """Return the first of these files that is there; names are relative to the folder and may hold `*`."""
    if not folder.is_dir():
        raise ValueError(f"`folder` (={str(folder)!r}) must be a folder that exists.")
    for name in names:
        found = sorted(folder.glob(name))
        if len(found) > 1:
            raise ValueError(f"{folder} holds {len(found)} files like {name!r} ({[p.name for p in found]}); keep one.")
        if found:
            return found[0]
    raise ValueError(f"{folder} holds none of {list(names)}; put the official file there, under its own name.")


# Pictures ------------------------------------------------------------------------------------------------------------


class Pictures:
    """The pictures of one folder, by name or by the 12 digits that their names end with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder.resolve()
        self._by_number: dict[int, Path] | None = None

    def named(self, where: str, name: str) -> Path:
        """Return the picture's path. Raises ValueError if it is not there, or not inside the folder."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self._root):
            raise ValueError(f"{where}: the file name {name!r} leaves the folder {self.folder}; name a file inside it.")
        if not path.is_file():
            raise ValueError(f"{where}: there is no image {name!r} in {self.folder}; add it, or name another folder.")
        return path

    def numbered(self, image_id: int, where: str) -> Path:
        """Return the path of the picture with this number, as COCO's are named."""
        if self._by_number is None:  # listed once: COCO's folders hold 80,000 files
            self._by_number = {}
            for path in sorted(pictures_in(self.folder)):
                if digits := re.search(r"(?:^|\D)(\d{12})$", path.stem):
                    add(self._by_number, int(digits[1]), path, str(path))
        if image_id not in self._by_number:
            raise ValueError(
                f"{where}: there is no image {image_id} in {self.folder} (a name that ends with {image_id:012d}, as "
                f"{' '.join(sorted(SUFFIXES))}); add it, or name another folder with `images`."
            )
        return self._by_number[image_id]


def pictures_in(folder: Path) -> Iterable[Path]:
    """List the folder's pictures."""
    return (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def first_with_pictures(places: Iterable[Path]) -> Path:
    """Return the first of these folders that holds pictures."""
    usual = list(places)
    for place in usual:
        if place.is_dir() and any(True for _ in pictures_in(place)):
            return place
    raise ValueError(f"no image folder: none of {[str(p) for p in usual]} holds any; give `images`.")


# Data sets -----------------------------------------------------------------------------------------------------------


def dataset_of(
    rows: Callable[..., Iterator[dict[str, Any]]],
    features: Mapping[str, Any],
    files: Iterable[Path],
    **arguments: Any,
) -> datasets.Dataset:
    """Write what `rows(**arguments)` yields to datasets' cache, as it comes, and map the file into memory.

    The cache is keyed by the function, its arguments, and the name, size and time of the `files` that it reads: a
    second call reads no file again. Raises: the ValueError of `rows`, or one for values that are not as `features` say.
    """
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    files = list(files)
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        made = datasets.Dataset.from_generator(
            _stamped,
            features=datasets.Features(features),
            gen_kwargs={"rows": rows, "arguments": arguments, "stamps": (CACHE_VERSION, *stamps)},
        )
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, pyarrow.ArrowException | TypeError):
            where = files[0] if files else rows.__name__
            raise ValueError(f"{where}: a column has values of different types ({cause}); make them equal.") from error
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from error
        raise
    assert isinstance(made, datasets.Dataset)
    return made


def _stamped(
    rows: Callable[..., Iterator[dict[str, Any]]], arguments: Mapping[str, Any], stamps: tuple
) -> Iterator[dict[str, Any]]:
    """Yield the rows; the stamps are there to be part of the cache's key."""
    empty = True
    for row in rows(**arguments):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{stamps[1][0] if len(stamps) > 1 else arguments}: holds no rows.")
