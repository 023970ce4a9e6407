"""Cuts dev from train, proves that the two share no example, and says what exactly a part of the data was."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from tasks.task import Parts, column, texts_of


def cut_dev(
    train: datasets.Dataset, parts: Parts, num_dev: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cut dev from train: by seed, all rows of one picture (or of one question without picture) on one side.

    Raises: ValueError where too few rows would be left on either side.
    """
    if not 1 <= num_dev < len(train):
        raise ValueError(
            f"`num_dev` (={num_dev}) must be at least 1 and less than the {len(train)} training examples, since dev is "
            "cut from them; choose another `--num-dev`."
        )
    if parts.rule == "last":
        first = len(train) - num_dev
        return train.select(range(first)), train.select(range(first, len(train)))
    groups: dict[bytes, list[int]] = {}
    for place, key in enumerate(_group_keys(train)):
        groups.setdefault(key, []).append(place)
    order = list(groups)
    random.Random(seed).shuffle(order)
    dev: list[int] = []
    while order and len(dev) < num_dev:
        dev += groups[order.pop()]
    if len(dev) == len(train):
        raise ValueError(
            f"all {len(train)} training examples are of {len(groups)} picture(s), so that none are left beside the "
            f"{num_dev} of dev; choose a smaller `--num-dev`, or give data with more pictures."
        )
    held = set(dev)
    return train.select([place for place in range(len(train)) if place not in held]), train.select(sorted(dev))


def draw_shots(rows: datasets.Dataset, shots: int, seed: int) -> datasets.Dataset:
    """Draw as many rows of each answer, by seed. Raises ValueError where one has fewer."""
    places: dict[str, list[int]] = {}
    for place, answer in enumerate(column(rows, "answer")):
        places.setdefault(answer, []).append(place)
    for answer, found in places.items():
        if not 1 <= shots <= len(found):
            raise ValueError(f"`shots` (={shots}) must be at least 1, and at most the {len(found)} rows of {answer!r}.")
    rng = random.Random(seed)
    return rows.select(sorted(place for found in places.values() for place in rng.sample(found, shots)))


def refuse_shared(train: datasets.Dataset, dev: datasets.Dataset) -> None:
    """Raise ValueError if an example of dev stands in train too: same question, and a picture of the same content."""
    for place, other in _shared(train, dev):
        raise ValueError(
            f"the dev example {_name(dev, other)} is in train as well, as {_name(train, place)}: same question, same "
            "picture; take it out of one of them, or leave all such out of train with `--drop-shared`."
        )


def without_shared(train: datasets.Dataset, dev: datasets.Dataset) -> datasets.Dataset:
    """Leave the examples of dev out of train. Raises ValueError if nothing is left."""
    found = {place for place, _ in _shared(train, dev)}
    if len(found) == len(train):
        raise ValueError(f"all {len(train)} training examples stand in dev as well; give other data.")
    return train.select([place for place in range(len(train)) if place not in found])


def _shared(train: datasets.Dataset, dev: datasets.Dataset) -> Iterator[tuple[int, int]]:
    """Yield places in train and dev of the same example."""
    pictures = _Contents()
    held: dict[tuple[bytes, int], list[int]] = {}
    for place, question in enumerate(_questions(dev)):
        held.setdefault((question, pictures.size(dev, place)), []).append(place)
    for place, question in enumerate(_questions(train)):
        # Files are read only where another one has their size.
        for other in held.get((question, pictures.size(train, place)), ()):
            if pictures.hash(train, place) == pictures.hash(dev, other):
                yield place, other


def describe_part(rows: datasets.Dataset) -> dict[str, Any]:
    """Count the rows of a part and hash their texts, ids and the names of their pictures."""
    digest = hashlib.sha256()
    for row in texts_of(rows):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    for name in _picture_names(rows):
        digest.update(name.encode())
    return {"num_rows": len(rows), "sha256": digest.hexdigest()}


def hash_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _questions(rows: datasets.Dataset) -> Iterator[bytes]:
    """A short hash of what each row asks, in words."""
    for row in texts_of(rows):
        asked = [row.get(key) for key in ("question", "text", "text_pair")]
        yield hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).digest()


def _group_keys(rows: datasets.Dataset) -> Iterator[bytes]:
    """A short hash of each row's picture, or of its texts where it has none."""
    names = list(_picture_names(rows))
    for place, row in enumerate(texts_of(rows)):
        key = row.get("image_id") or (names[place] if names and names[place] else None) or row.get("question")
        yield hashlib.blake2b(str(key or row["id"]).encode(), digest_size=16).digest()


def _picture_names(rows: datasets.Dataset) -> Iterator[str]:
    """Each row's picture by name, where the rows are ours: those of the hub have theirs inside."""
    if rows.format["type"] == "custom" or "image" not in rows.column_names:
        return
    for image in rows["image"]:
        yield str((image or {}).get("path") or "")


class _Contents:
    """Sizes and hashes of pictures; each file is looked at once."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._hashes: dict[str, bytes] = {}

    def size(self, rows: datasets.Dataset, place: int) -> int:
        path, content = _picture(rows, place)
        if content is not None or path is None:
            return len(content or b"")
        if path not in self._sizes:
            self._sizes[path] = _looked_at(Path(path), _name(rows, place)).stat().st_size
        return self._sizes[path]

    def hash(self, rows: datasets.Dataset, place: int) -> bytes:
        path, content = _picture(rows, place)
        if content is not None or path is None:
            return hashlib.sha256(content or b"").digest()
        if path not in self._hashes:
            self._hashes[path] = bytes.fromhex(hash_file(Path(path)))
        return self._hashes[path]


def _picture(rows: datasets.Dataset, place: int) -> tuple[str | None, bytes | None]:
    image = _row(rows, place).get("image") or {}
    return image.get("path"), image.get("bytes")


def _looked_at(path: Path, name: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{name} has the image {str(path)!r}, which is not there; put it back.")
    return path


def _name(rows: datasets.Dataset, place: int) -> str:
    return f"{_row(rows, place)['id']!r} (row {place})"


def _row(rows: datasets.Dataset, place: int) -> dict[str, Any]:
    row = rows[place]
    assert isinstance(row, dict)
    return row
