"""Folders of questions, captions and pictures as `datasets.Dataset`s, in the columns that `Collator` reads.

Files are read once, row by row, into datasets' own cache, and pictures when a row is read, so memory does not follow
the size of the data. What is wrong in a file is a ValueError that names file and row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlreft.data import files
from vlreft.data.files import Pictures

if TYPE_CHECKING:
    import datasets


def load_vqa(folder: str | Path, split: str, images: str | Path | None = None) -> datasets.Dataset:
    """Load a folder with VQAv2's official files, or files of their form named `<split>_questions.json`.

    Columns: image, question, answer (the annotators' commonest), answers (each annotator's), question_id, image_id; one
    row for a question, in the order of the questions file. `images` is the picture folder where it is not found by
    itself. Raises: ValueError for missing or broken files, naming file and row.
    """
    from datasets import Image, List, Value

    text, number = Value("string"), Value("int64")
    features = {"image": Image(), "question": text, "answer": text, "answers": List(text), "question_id": number}
    sources = vqa_files(Path(folder), split)
    arguments = {"folder": Path(folder), "split": split, "images": images}
    if isinstance(_first(sources[0], "questions").get("question_id"), str):
        features["question_id"] = text
    return files.dataset_of(vqa_rows, {**features, "image_id": number}, sources, **arguments)


def vqa_files(folder: Path, split: str) -> list[Path]:
    """Return the split's questions and annotations file."""
    return [_split_file(folder, split, kind) for kind in ("questions", "annotations")]


def vqa_rows(folder: Path, split: str, images: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield `load_vqa`'s rows, `image` as a path."""
    questions, notes = vqa_files(folder, split)
    pictures = Pictures(_image_folder(folder, split, images))
    pairs = files.paired(
        files.json_rows(questions, "questions"),
        files.json_rows(notes, "annotations"),
        *("question_id", (int, str), ("question", "annotation")),
    )
    for (where, question), (where_note, note) in pairs:
        image_id = files.value(question, "image_id", int, where)
        if files.value(note, "image_id", int, where_note) != image_id:
            raise ValueError(f"{where_note}: is for image {note['image_id']}, its question is for image {image_id}.")
        answers = [files.mapping(answer, where_note) for answer in files.value(note, "answers", list, where_note)]
        yield {
            "image": str(pictures.numbered(image_id, where)),
            "question": files.value(question, "question", str, where),
            "answer": files.value(note, "multiple_choice_answer", str, where_note),
            "answers": [files.value(answer, "answer", str, where_note) for answer in answers],
            "question_id": question["question_id"],
            "image_id": image_id,
        }


def load_captions(
    folder: str | Path, split: str, images: str | Path | None = None, *, prompt: str = "describe the image"
) -> datasets.Dataset:
    """Load a folder with captions in COCO's form, `captions_val2014.json` or `<split>_captions.json`.

    Columns: image, question (`prompt` in every row), answer (the caption), image_id; one row for a caption. Raises:
    ValueError for missing or broken files, naming file and row.
    """
    from datasets import Image, Value

    text = Value("string")
    features = {"image": Image(), "question": text, "answer": text, "image_id": Value("int64")}
    arguments = {"folder": Path(folder), "split": split, "images": images, "prompt": prompt}
    return files.dataset_of(caption_rows, features, [caption_file(Path(folder), split)], **arguments)


def caption_file(folder: Path, split: str) -> Path:
    """Return the split's captions file."""
    return _split_file(folder, split, "captions")


def caption_rows(
    folder: Path, split: str, images: str | Path | None = None, prompt: str = "describe the image"
) -> Iterator[dict[str, Any]]:
    """Yield `load_captions`'s rows, `image` as a path."""
    file = caption_file(folder, split)
    pictures = Pictures(_image_folder(folder, split, images))
    names: dict[Any, tuple[str, str]] = {}
    for where, row in files.json_rows(file, "images"):
        name = files.value(row, "file_name", str, where)
        files.add(names, files.value(row, "id", int, where), (where, name), where)
    paths: dict[int, Path] = {}
    for where, row in files.json_rows(file, "annotations"):
        image_id, caption = files.value(row, "image_id", int, where), files.value(row, "caption", str, where)
        path = paths.get(image_id)
        if path is None:  # looked up once for the five captions of an image
            path = pictures.named(*names[image_id]) if image_id in names else pictures.numbered(image_id, where)
            paths[image_id] = path
        yield {"image": str(path), "question": prompt, "answer": caption, "image_id": image_id}


def load_jsonl(path: str | Path) -> datasets.Dataset:
    """Load question and answer rows, a JSON object a line, each with `question` and `answer`.

    `image`, if given, is a file name below the file's folder; other columns are kept as they are, and every row has the
    same ones. Raises: ValueError, naming file and line.
    """
    file = Path(path)
    return files.dataset_of(jsonl_rows, _jsonl_features(file), [file], file=file)


def jsonl_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield `load_jsonl`'s rows, `image` as a path."""
    ids: dict[Any, None] = {}
    first: Mapping[str, Any] | None = None
    pictures = Pictures(file.parent)
    for where, row in files.json_lines(file):
        for key in ("question", "answer"):
            files.value(row, key, str, where)
        if row.get("question_id") is not None:
            files.add(ids, row["question_id"], None, where)
        if row.get("image") is not None:
            row = {**row, "image": str(pictures.named(where, files.value(row, "image", str, where)))}
        first = row if first is None else first
        if row.keys() != first.keys():
            raise ValueError(
                f"{where}: has the keys {sorted(row)}, those before have {sorted(first)}; make them equal."
            )
        yield dict(row)


def _jsonl_features(file: Path) -> dict[str, Any]:
    """The kind of each column, from its values: one pass over the file, a value of each column held."""
    import pyarrow
    from datasets import Features, Image

    checked = {"question": "", "answer": "", "image": ""}  # as the rows are read
    samples: dict[str, Any] = {}
    for where, row in files.json_lines(file):
        for name, found in row.items():
            samples[name] = checked[name] if name in checked else _of_one_kind(samples.get(name), found, name, where)
    features = dict(Features.from_arrow_schema(pyarrow.Table.from_pylist([samples]).schema))
    return {**features, "image": Image()} if "image" in features else features


def _of_one_kind(known: Any, found: Any, name: str, where: str) -> Any:
    """The value that says what a column holds, of one known and one found; whole numbers may stand among others."""
    if known is None or found is None:
        return known if found is None else found
    if {type(known), type(found)} == {int, float}:
        return float(known)
    if type(known) is not type(found):
        raise ValueError(
            f"{where}: {name!r} (={found!r}) is of another type than in the rows before ({known!r}); make them equal."
        )
    return known


def _first(file: Path, key: str) -> Mapping[str, Any]:
    return next((row for _, row in files.json_rows(file, key)), {})


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
    return files.first_with_pictures([Path(images)] if images is not None else _usual_image_folders(folder, split))


def _usual_image_folders(folder: Path, split: str) -> list[Path]:
    dated = [f"{split}2014", f"{split}2015", f"{split}2017"]
    own = folder / "images"
    below = [own / name for name in (split, *dated)] + [own] + [folder / name for name in (split, *dated)]
    home = folder.resolve()  # the parent of "." is found from its full name
    beside = [home.parent / name / split for name in (f"images_{home.name}", "images")]
    return below + beside
