"""Reads the caption files with Karpathy's splits: dataset_coco.json and dataset_flickr30k.json."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from tasks.metrics.score import Row
from tasks.task import ID, IMAGE, VQA_FEATURES
from vlreft.data import files
from vlreft.data.files import Pictures

INSTRUCTION = "Provide a one-sentence caption for the provided image."
INSTRUCTION_SOURCE = "prompt: lmms-eval, tasks/coco_cap/utils.py, tasks/nocaps/_default_template_nocaps_yaml"
GENERATION = {"max_new_tokens": 64, "do_sample": False}
GENERATION_SOURCE = "decoding: greedy, 64 new tokens at most, as lmms-eval, tasks/coco_cap/coco2017_cap_val.yaml"
SPLITS_SOURCE = (
    "splits: Karpathy and Li 2015, https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip; "
    "train is his train and restval, as captioning papers since have it (COCO: 113,287 / 5,000 / 5,000 pictures)"
)
CAPTION_FEATURES = VQA_FEATURES
PAIR_FEATURES = ID | IMAGE | {"image_id": datasets.Value("string"), "text": datasets.Value("string")}

# The part that a picture of each of the file's splits is in.
PARTS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


@dataclass(frozen=True)
class Captioned:
    """A picture, and the id and text of each of its captions, in the file's order."""

    id: str
    image: str
    captions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KarpathyFile:
    """One of the files. places: the folders that its pictures, with the folders that it names, may be in."""

    name: str
    places: tuple[str, ...]

    def find(self, folder: Path) -> Path:
        """Return the file's path."""
        return files.find_file(folder, self.name, f"annotations/{self.name}")

    def paths(self, folder: Path, part: str) -> list[Path]:
        """Return the one file that has all parts."""
        return [self.find(folder)]

    def pictures(self, folder: Path, part: str) -> Iterator[Captioned]:
        """Yield the pictures of train, val or test. Raises: ValueError, naming file and row."""
        file = self.find(folder)
        images: dict[str, None] = {}
        sentences: dict[int, None] = {}
        home: Pictures | None = None
        for where, row in files.json_rows(file, "images"):
            if self._part(row, where) != part:
                continue
            name = _file_name(row, where)
            home = home or self._home(folder, name)
            number = image_number(name, where)
            files.add(images, number, None, where)
            captions = tuple(_sentences(row, sentences, where))
            if not captions:
                raise ValueError(f"{where}: the picture {name} has no caption; add one or drop the row.")
            yield Captioned(number, str(home.named(where, name)), captions)

    def _part(self, row: Row, where: str) -> str:
        split = files.text(row, "split", where)
        if split not in PARTS:
            raise ValueError(f"{where}: 'split' (={split!r}) must be one of {list(PARTS)}.")
        return PARTS[split]

    def _home(self, folder: Path, name: str) -> Pictures:
        """The first of the usual places that holds the first picture; it is missed in the first place otherwise."""
        places = [folder / place for place in self.places if (folder / place).is_dir()]
        return Pictures(next((place for place in places if (place / name).is_file()), (*places, folder)[0]))


COCO = KarpathyFile("dataset_coco.json", (".", "images"))
FLICKR30K = KarpathyFile("dataset_flickr30k.json", ("flickr30k-images", "flickr30k_images", "images", "."))


def caption_rows(pictures: Iterable[Captioned], *, is_training: bool) -> Iterator[dict[str, Any]]:
    """Yield a row per caption for training, else one per picture with all of its captions as references."""
    for picture in pictures:
        if is_training:
            for number, text in picture.captions:
                yield caption_row(number, picture.image, [text])
        else:
            yield caption_row(picture.id, picture.image, [text for _, text in picture.captions])


def caption_row(name: str, image: Any, captions: list[str]) -> dict[str, Any]:
    """Make a row whose answer is the first caption and whose references are all of them."""
    return {"id": name, "image": image, "question": INSTRUCTION, "answer": captions[0], "references": captions}


def pair_rows(pictures: Iterable[Captioned], num_captions: int | None) -> Iterator[dict[str, Any]]:
    """Yield a row per caption: of the first `num_captions` of each picture, or of all."""
    for picture in pictures:
        for number, text in picture.captions[:num_captions]:
            yield {"id": number, "image": picture.image, "image_id": picture.id, "text": text}


def caption_line(row: Row, answer: str) -> dict[str, Any]:
    """Make an entry of COCO's results file for captions."""
    return {"image_id": int(row["id"]), "caption": answer}


def image_number(name: str, where: str) -> str:
    """Return the number that a picture's name ends with, its id on COCO and on Flickr."""
    found = re.search(r"(\d+)$", Path(name).stem)
    if found is None:
        raise ValueError(f"{where}: the name {name!r} does not end with the picture's number; give the official name.")
    return str(int(found[1]))


def _file_name(row: Row, where: str) -> str:
    name = files.text(row, "filename", where)
    return f"{files.text(row, 'filepath', where)}/{name}" if "filepath" in row else name


def _sentences(row: Row, seen: dict[int, None], where: str) -> Iterator[tuple[str, str]]:
    """The row's captions; spaces around one are dropped, which no metric sees."""
    for place, entry in enumerate(files.value(row, "sentences", list, where)):
        at = f"{where}, sentence {place}"
        sentence = files.mapping(entry, at)
        number = files.value(sentence, "sentid", int, at)
        files.add(seen, number, None, at)
        yield str(number), files.text(sentence, "raw", at).strip()
