"""Folders of questions, captions and pictures as `datasets.Dataset`s, in the columns that `Collator` reads.

Pictures are decoded when a row is read, not before. What is wrong in a file is a ValueError that names file and row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def load_vqa(folder: str | Path, split: str, images: str | Path | None = None) -> datasets.Dataset:
    """Load a folder with VQAv2's official files, or files of their form named `<split>_questions.json`.

    Columns: image, question, answer (the annotators' commonest), answers (each annotator's), question_id, image_id; one
    row for a question, in the order of the questions file. `images` is the picture folder where it is not found by
    itself. Raises: ValueError for missing or broken files, naming file and row.
    """
    folder = Path(folder)
    questions_file, annotations_file = (_split_file(folder, split, kind) for kind in ("questions", "annotations"))
    annotations = {}
    for where, row in _rows(annotations_file, "annotations"):
        _add(annotations, _get(row, "question_id", (int, str), where), (where, row), where)
    pictures = _Pictures(_image_folder(folder, split, images))
    rows, seen = [], {}
    for where, question in _rows(questions_file, "questions"):
        question_id = _get(question, "question_id", (int, str), where)
        _add(seen, question_id, None, where)
        if question_id not in annotations:
            raise ValueError(f"{where}: question {question_id} has no annotation in {annotations_file}; add it.")
        where_note, note = annotations[question_id]
        rows.append(_vqa_row(where, question, where_note, note, pictures))
    for question_id, (where, _) in annotations.items():
        if question_id not in seen:
            raise ValueError(f"{where}: annotation {question_id} has no question in {questions_file}; remove it.")
    return _dataset(rows, ["image", "question", "answer", "answers", "question_id", "image_id"], questions_file)


def load_captions(
    folder: str | Path, split: str, images: str | Path | None = None, *, prompt: str = "describe the image"
) -> datasets.Dataset:
    """Load a folder with captions in COCO's form, `captions_val2014.json` or `<split>_captions.json`.

    Columns: image, question (`prompt` in every row), answer (the caption), image_id; one row for a caption. Raises:
    ValueError for missing or broken files, naming file and row.
    """
    folder = Path(folder)
    file = _split_file(folder, split, "captions")
    pictures = _Pictures(_image_folder(folder, split, images))
    names: dict[Any, tuple[str, str]] = {}
    for where, row in _rows(file, "images"):
        _add(names, _get(row, "id", int, where), (where, _get(row, "file_name", str, where)), where)
    rows, paths = [], {}
    for where, row in _rows(file, "annotations"):
        image_id, caption = _get(row, "image_id", int, where), _get(row, "caption", str, where)
        path = paths.get(image_id)
        if path is None:  # looked up once for the five captions of an image
            path = pictures.named(*names[image_id]) if image_id in names else pictures.numbered(image_id, where)
            paths[image_id] = path
        rows.append({"image": str(path), "question": prompt, "answer": caption, "image_id": image_id})
    return _dataset(rows, ["image", "question", "answer", "image_id"], file)


def load_jsonl(path: str | Path) -> datasets.Dataset:
    """Load question and answer rows, a JSON object a line, each with `question` and `answer`.

    `image`, if given, is a file name below the file's folder; other columns are kept as they are, and every row has the
    same ones. Raises: ValueError, naming file and line.
    """
    file, rows, ids = Path(path), [], {}
    pictures = _Pictures(file.parent)
    for number, line in enumerate(_read(file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = _mapping(_json(line, where), where)
        for key in ("question", "answer"):
            _get(row, key, str, where)
        if row.get("question_id") is not None:
            _add(ids, row["question_id"], None, where)
        if row.get("image") is not None:
            row = {**row, "image": str(pictures.named(where, _get(row, "image", str, where)))}
        if rows and row.keys() != rows[0].keys():
            raise ValueError(
                f"{where}: has the keys {sorted(row)}, those before have {sorted(rows[0])}; make them equal."
            )
        rows.append(row)
    return _dataset(rows, list(rows[0]) if rows else [], file)


class _Pictures:
    """The pictures of one folder, by name or by the 12 digits that their names end with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder.resolve()
        self._by_number: dict[int, Path] | None = None

    def named(self, where: str, name: str) -> Path:
        path = self.folder / name
        if not path.resolve().is_relative_to(self._root):
            raise ValueError(f"{where}: the file name {name!r} leaves the folder {self.folder}; name a file inside it.")
        if not path.is_file():
            raise ValueError(f"{where}: there is no image {name!r} in {self.folder}; add it, or name another folder.")
        return path

    def numbered(self, image_id: int, where: str) -> Path:
        if self._by_number is None:  # listed once: COCO's folders hold 80,000 files
            self._by_number = {}
            for path in sorted(_pictures_in(self.folder)):
                if digits := re.search(r"(?:^|\D)(\d{12})$", path.stem):
                    _add(self._by_number, int(digits[1]), path, str(path))
        if image_id not in self._by_number:
            raise ValueError(
                f"{where}: there is no image {image_id} in {self.folder} (a name that ends with {image_id:012d}, as "
                f"{' '.join(sorted(SUFFIXES))}); add it, or name another folder with `images`."
            )
        return self._by_number[image_id]


def _vqa_row(where: str, question: Mapping, where_note: str, note: Mapping, pictures: _Pictures) -> dict[str, Any]:
    image_id = _get(question, "image_id", int, where)
    if _get(note, "image_id", int, where_note) != image_id:
        raise ValueError(f"{where_note}: is for image {note['image_id']}, its question is for image {image_id}.")
    answers = [_mapping(answer, where_note) for answer in _get(note, "answers", list, where_note)]
    return {
        "image": str(pictures.numbered(image_id, where)),
        "question": _get(question, "question", str, where),
        "answer": _get(note, "multiple_choice_answer", str, where_note),
        "answers": [_get(answer, "answer", str, where_note) for answer in answers],
        "question_id": question["question_id"],
        "image_id": image_id,
    }


def _split_file(folder: Path, split: str, kind: str) -> Path:
    """The one file of this kind: `val_questions.json`, `v2_OpenEnded_mscoco_val2014_questions.json`, ..."""
    if not re.fullmatch(r"[\w-]+", split):
        raise ValueError(f"`split` (={split!r}) must be a name such as 'train'; it is part of file names.")
    if not folder.is_dir():
        raise ValueError(f"`folder` (={str(folder)!r}) must be a folder that exists.")
    part = re.escape(split) + r"(?:\d{4})?"
    name = re.compile(rf"(.*_)?{part}_{kind}\.json|{kind}_{part}\.json")
    found = sorted(path for path in folder.iterdir() if name.fullmatch(path.name))
    if len(found) != 1:
        raise ValueError(
            f"{folder} must hold one file of {kind} for the split {split!r}, named {split}_{kind}.json or as the "
            f"official ones are; got {[p.name for p in found]}."
        )
    return found[0]


def _image_folder(folder: Path, split: str, images: str | Path | None) -> Path:
    """The given folder, else the first of the usual ones that holds pictures."""
    usual = [Path(images)] if images is not None else _usual_image_folders(folder, split)
    for place in usual:
        if place.is_dir() and any(True for _ in _pictures_in(place)):
            return place
    raise ValueError(f"no image folder for {folder}: none of {[str(p) for p in usual]} holds any; give `images`.")


def _usual_image_folders(folder: Path, split: str) -> list[Path]:
    dated = [f"{split}2014", f"{split}2015", f"{split}2017"]
    own = folder / "images"
    below = [own / name for name in (split, *dated)] + [own] + [folder / name for name in (split, *dated)]
    home = folder.resolve()  # the parent of "." is found from its full name
    beside = [home.parent / name / split for name in (f"images_{home.name}", "images")]
    return below + beside


def _pictures_in(folder: Path) -> Iterable[Path]:
    return (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _rows(file: Path, key: str) -> Iterable[tuple[str, Mapping]]:
    rows = _get(_mapping(_json(_read(file), str(file)), str(file)), key, list, str(file))
    for number, row in enumerate(rows):
        where = f"{file}, {key} row {number}"
        yield where, _mapping(row, where)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); give a JSON file in UTF-8.") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is not JSON ({error}); mend it or fetch it anew.") from error


def _mapping(value: Any, where: str) -> Mapping:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got a {type(value).__name__} where a JSON object is expected.")
    return value


def _get(row: Mapping, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if key not in row:
        raise ValueError(f"{where}: has no {key!r}, only {sorted(row)}; add it.")
    # JSON's true and false are ints to Python.
    if not isinstance(row[key], kind) or isinstance(row[key], bool):
        raise ValueError(f"{where}: {key!r} (={row[key]!r}) has the wrong type {type(row[key]).__name__}.")
    return row[key]


def _add(table: dict, key: Any, value: Any, where: str) -> None:
    if key in table:
        raise ValueError(f"{where}: the id {key} is there a second time; ids must be unique.")
    table[key] = value


def _dataset(rows: list[dict[str, Any]], columns: list[str], file: Path) -> datasets.Dataset:
    import datasets

    if not rows:
        raise ValueError(f"{file}: holds no rows.")
    try:
        data = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in columns})
    except (TypeError, ValueError) as error:  # Arrow's
        raise ValueError(f"{file}: a column has values of different types ({error}); make them equal.") from error
    return data.cast_column("image", datasets.Image()) if "image" in columns else data
