"""CLIP's classification by class names: any folder of pictures by class, and the Oxford-IIIT Pets."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from tasks.metrics.ranking import accuracy
from tasks.metrics.score import Row
from tasks.task import ID, IMAGE, Hub, Parts, Task
from vlreft.data import files
from vlreft.data.files import Pictures

# What torchvision.datasets.ImageFolder takes for a picture.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FEATURES = ID | IMAGE | {"answer": datasets.Value("string")}
PETS_LISTS = {"train": "trainval", "test": "test"}


def folder_files(folder: Path, part: str) -> list[Path]:
    """Return the folders of a part's classes, by whose times a changed part is known."""
    return [_part_folder(folder, part), *_class_folders(folder, part).values()]


def read_folder(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the pictures in folder/part/CLASS and below, by class and then by path; ids are paths in the folder.

    A class's name is its folder's with spaces for underscores.
    """
    classes = _class_folders(folder, part)
    known = classes if part == "train" or not (folder / "train").is_dir() else _class_folders(folder, "train")
    for name, place in classes.items():
        if name not in known:
            raise ValueError(f"{place}: the class {name!r} is not in {folder / 'train'}; add it there or remove it.")
        empty = True
        for image in _pictures_below(place):
            empty = False
            yield {"id": image.relative_to(folder).as_posix(), "image": str(image), "answer": name}
        if empty:
            raise ValueError(f"{place}: the class holds no picture ({' '.join(SUFFIXES)}); add some or remove it.")


def _part_folder(folder: Path, part: str) -> Path:
    place = folder / part
    if not re.fullmatch(r"[\w-]+", part) or not place.is_dir():
        raise ValueError(f"{folder} has no folder {part!r} with a folder of pictures for each class; add it.")
    return place


def _class_folders(folder: Path, part: str) -> dict[str, Path]:
    """The folder of each class, in the order of the folders' names."""
    place = _part_folder(folder, part)
    classes: dict[str, Path] = {}
    for path in sorted(place.iterdir()):
        if path.is_dir():
            name = path.name.replace("_", " ").strip()
            if name in classes:
                raise ValueError(f"{path}: its class {name!r} is that of {classes[name]} too; rename one.")
            classes[name] = path
    if len(classes) < 2:
        raise ValueError(f"{place} holds {len(classes)} class folders; there must be one for each of two or more.")
    return classes


def _pictures_below(place: Path) -> Iterator[Path]:
    """The pictures in a folder and its folders, in ImageFolder's order; one folder's names are held at a time."""
    for root, folders, names in os.walk(place, followlinks=True):
        folders.sort()
        yield from (Path(root, name) for name in sorted(names) if name.lower().endswith(SUFFIXES))


def pets_files(folder: Path, part: str) -> list[Path]:
    """Return the official list of a part's pictures."""
    return [files.find_file(folder, f"annotations/{PETS_LISTS[part]}.txt")]


def read_pets(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the pictures of the official list, whose lines are `american_bulldog_10 2 2 1`."""
    (file,) = pets_files(folder, part)
    pictures = Pictures(folder / "images")
    seen: dict[str, None] = {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, text in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if text.startswith("#") or not text.strip():
                continue
            name = text.split()[0]
            files.add(seen, name, None, where)
            yield {"id": name, "image": str(pictures.named(where, f"{name}.jpg")), "answer": breed_of(name, where)}


def breed_of(name: str, where: str) -> str:
    """Return the breed that a picture of the Pets is named after: `american_bulldog_10` has an "American Bulldog"."""
    found = re.fullmatch(r"([A-Za-z]+(?:_[A-Za-z]+)*)_\d+", name)
    if found is None:
        raise ValueError(f"{where}: the name {name!r} must be a breed and a number, as 'american_bulldog_10'.")
    return found[1].replace("_", " ").title()


def pets_from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's data set."""
    name = row["image_id"]
    return {"id": name, "image": row["image"], "answer": breed_of(name, "the hub's data set")}


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make a line with a picture's id and its class; there is no official form."""
    return {"id": row["id"], "answer": answer}


METRIC_SOURCE = "metric: top-1 accuracy, LAION-AI/CLIP_benchmark, clip_benchmark/metrics/zeroshot_classification.py"
FOLDER_SOURCES = (
    "data: torchvision.datasets.ImageFolder's layout, a folder of pictures for each class",
    "template: openai/CLIP, README.md and Radford et al. 2021, section 3.1.4",
    METRIC_SOURCE,
)
FOLDER = Task(
    name="fewshot",
    title="classification of the pictures of any folder train/CLASS, test/CLASS by class name",
    kind="classes",
    parts=Parts(train="train", tests=("test",), num_dev=500),
    features=FEATURES,
    read=read_folder,
    files=folder_files,
    metric=accuracy,
    line=line,
    sources=(*FOLDER_SOURCES, "dev: 500 pictures cut from train by the run's seed"),
)
FOLDER_WITH_DEV = Task(
    name="fewshot_dev",
    title="classification of the pictures of any folder train/CLASS, dev/CLASS, test/CLASS by class name",
    kind="classes",
    parts=Parts(train="train", dev="dev", tests=("test",)),
    features=FEATURES,
    read=read_folder,
    files=folder_files,
    metric=accuracy,
    line=line,
    sources=FOLDER_SOURCES,
)
PETS = Task(
    name="pets",
    title="Oxford-IIIT Pets: 37 breeds, top-1 accuracy on the official test list",
    kind="classes",
    parts=Parts(train="train", tests=("test",), num_dev=736),
    features=FEATURES,
    read=read_pets,
    files=pets_files,
    metric=accuracy,
    line=line,
    hub=Hub("timm/oxford-iiit-pet", {"train": "train", "test": "test"}, pets_from_hub),
    templates=("a photo of a {}, a type of pet.",),
    sources=(
        "data: https://www.robots.ox.ac.uk/~vgg/data/pets, annotations/trainval.txt and test.txt",
        "class names and template: LAION-AI/CLIP_benchmark, en_classnames.json and "
        "en_zeroshot_classification_templates.json (pets)",
        f"{METRIC_SOURCE}; Radford et al. 2021 report mean per class instead",
        "dev: a fifth of trainval cut by the run's seed, the share of KaiyangZhou/CoOp, datasets/oxford_pets.py",
    ),
)
TASKS = (FOLDER, FOLDER_WITH_DEV, PETS)
