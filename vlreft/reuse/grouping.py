"""`ImageGroups`: a sampler whose batches hold the questions about one picture together, pictures in random order."""

import os
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Sampler

WAYS_OUT = "give each row an `image_id`, the same for all rows of a picture, or leave out `group_by_image`"


class ImageGroups(Sampler[int]):
    """Yields places of rows: those of a picture one after the other, pictures and their rows shuffled every epoch.

    keys: what each row's picture is known by; None for a row without one, which stands alone. batch_size: rows of a
    batch; a picture is rather put where it fills a batch up than split between two. seed and `epoch()` decide the
    order, nothing else does, so that a resumed epoch has the same one.
    """

    def __init__(self, keys: Sequence[Hashable], batch_size: int, *, seed: int, epoch: Callable[[], int]) -> None:
        self.batch_size, self.seed, self.epoch = batch_size, seed, epoch
        rows: dict[Hashable, list[int]] = {}
        for place, key in enumerate(keys):
            rows.setdefault(("alone", place) if key is None else ("picture", key), []).append(place)
        self.pictures = list(rows.values())
        self.num_rows = len(keys)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        """Yield the places of this epoch's rows."""
        chance = random.Random(f"{self.seed} {self.epoch()}")
        pictures = [list(rows) for rows in self.pictures]
        chance.shuffle(pictures)
        waiting: dict[int, deque[int]] = {}  # numbers of pictures by how many rows they have
        for number, rows in enumerate(pictures):
            chance.shuffle(rows)
            waiting.setdefault(len(rows), deque()).append(number)
        is_taken = [False] * len(pictures)
        num_yielded = 0
        for number in range(len(pictures)):
            next_one: int | None = number
            while next_one is not None and not is_taken[next_one]:
                is_taken[next_one] = True
                num_yielded += len(pictures[next_one])
                yield from pictures[next_one]
                fitting = waiting.get(-num_yielded % self.batch_size, deque())
                while fitting and is_taken[fitting[0]]:
                    fitting.popleft()
                next_one = fitting[0] if fitting else None


def image_keys(dataset: Any) -> list[Hashable]:
    """Return what each row's picture is known by: its `image_id`, else its picture's path; None for a row without one.

    Takes a `datasets.Dataset` or a list of rows. Raises ValueError where rows do not say which picture they show.
    """
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        keys = _column_keys(dataset)
    elif isinstance(dataset, list | tuple):
        keys = [_row_key(row, place) for place, row in enumerate(dataset)]
    else:
        raise ValueError(
            f"`group_by_image` needs a datasets.Dataset or a list of rows, which say what picture a row shows without "
            f"opening it; got a {type(dataset).__name__}"
        )
    if all(key is None for key in keys):
        raise ValueError(f"`group_by_image` found no row with an image among {len(keys)}; {WAYS_OUT}")
    return keys


def _column_keys(dataset: Any) -> list[Hashable]:
    from datasets import Image

    names = dataset.column_names
    if "image_id" in names:
        return list(dataset["image_id"])
    column = next((name for name in ("image", "images") if name in names), None)
    if column is None:
        raise ValueError(f"`group_by_image` needs a column `image_id` or `image`, got {names}; {WAYS_OUT}")
    feature = dataset.features[column]
    if column == "image" and isinstance(feature, Image):
        # Not opened: a picture in a file of its own is known by that, one inside of the dataset by nothing.
        places = dataset.select_columns([column]).cast_column(column, Image(decode=False))[column]
        return [_stored_key(stored, place) for place, stored in enumerate(places)]
    if column == "images" and not _holds_paths(feature):
        raise ValueError(f"`group_by_image` cannot tell pictures in the column `images` apart; {WAYS_OUT}")
    return [_row_key({column: value}, place) for place, value in enumerate(dataset[column])]


def _holds_paths(feature: Any) -> bool:
    from datasets import List, Value

    return isinstance(feature, List) and isinstance(feature.feature, Value)


def _stored_key(stored: Mapping[str, Any] | None, place: int) -> Hashable:
    if stored is None:
        return None
    if stored.get("bytes") is not None or not stored.get("path"):
        raise ValueError(f"`group_by_image`: row {place} holds its picture itself, not the path of a file; {WAYS_OUT}")
    return stored["path"]


def _row_key(row: Any, place: int) -> Hashable:
    if not isinstance(row, Mapping):
        raise ValueError(f"`group_by_image` needs rows that are mappings, row {place} is a {type(row).__name__}")
    if row.get("image_id") is not None:
        return row["image_id"]
    pictures = row.get("images") if row.get("images") is not None else row.get("image")
    if pictures is None:
        return None
    pictures = pictures if isinstance(pictures, list | tuple) else [pictures]
    if not all(isinstance(picture, str | os.PathLike) for picture in pictures):
        kinds = sorted({type(picture).__name__ for picture in pictures})
        raise ValueError(
            f"`group_by_image`: row {place} has no `image_id`, and its picture is no path but {kinds}; {WAYS_OUT}"
        )
    return tuple(os.fspath(picture) for picture in pictures) or None
