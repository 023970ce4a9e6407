"""Small data sets in the official form of each task with captions, classes or pairs; pictures are of the demo world."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
SHAPES = ("circle", "square", "triangle", "star")
SPLITS = ("train",) * 6 + ("restval",) * 2 + ("val",) * 4 + ("test",) * 4


def thing(number: int) -> tuple[str, str]:
    """Return the colour and shape of a numbered object; 32 numbers have 32 objects."""
    return COLORS[number % 8], SHAPES[number // 8 % 4]


def draw(path: Path, color: str, shape: str, shift: int = 0) -> None:
    """Save a 64x64 picture of one shape on black, another picture for another `shift` (0 to 8)."""
    image = Image.new("RGB", (64, 64), "black")
    pen = ImageDraw.Draw(image)
    left, top = 10 + 3 * (shift % 3), 10 + 3 * (shift // 3)
    corners = {"triangle": ((16, 0), (34, 34), (0, 34)), "star": ((18, 0), (26, 38), (0, 14), (36, 14), (10, 38))}
    if shape == "circle":
        pen.ellipse((left, top, left + 32, top + 32), fill=color)
    elif shape == "square":
        pen.rectangle((left, top, left + 32, top + 32), fill=color)
    else:
        pen.polygon([(left + x, top + y) for x, y in corners[shape]], fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def captions_of(number: int, num: int) -> list[str]:
    """Return ways to name a numbered object in the demo world's words."""
    color, shape = thing(number)
    ways = ("{s} {c}", "{c} {s}", "a {c} {s}", "the {s} is {c}", "there is a {c} {s}", "{c} is the {s}")
    return [ways[place % 6].format(c=color, s=shape) for place in range(num)]


def write(path: Path, content: Any) -> None:
    """Save JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def karpathy_images(name_of: Callable[[int, str], dict[str, str]], first_sixth: int | None) -> Iterable[dict[str, Any]]:
    """Yield the entries of 16 pictures; that one has six captions, the others five."""
    sentid = 700
    for number, split in enumerate(SPLITS):
        texts = captions_of(number, 6 if number == first_sixth else 5)
        sentences = [{"raw": text, "imgid": number, "sentid": sentid + place} for place, text in enumerate(texts)]
        sentid += len(texts)
        ids = [sentence["sentid"] for sentence in sentences]
        yield {**name_of(number, split), "imgid": number, "split": split, "sentids": ids, "sentences": sentences}


def coco(folder: Path) -> None:
    """dataset_coco.json; train2014 and val2014. The first test picture has six captions."""

    def name_of(number: int, split: str) -> dict[str, Any]:
        year = "train2014" if split == "train" else "val2014"
        return {"filepath": year, "filename": f"COCO_{year}_{100 + number:012d}.jpg", "cocoid": 100 + number}

    images = list(karpathy_images(name_of, 12))
    write(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for number, row in enumerate(images):
        draw(folder / row["filepath"] / row["filename"], *thing(number))


def flickr30k(folder: Path) -> None:
    """dataset_flickr30k.json; flickr30k-images."""
    images = list(karpathy_images(lambda number, _: {"filename": f"{1000092795 + number}.jpg"}, None))
    write(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    for number, row in enumerate(images):
        draw(folder / "flickr30k-images" / row["filename"], *thing(number))


def captions(folder: Path) -> None:
    """{train,dev,test}_captions.json in COCO form; images/{train,dev,test}. A picture has its captions far apart."""
    for start, (split, num) in zip((0, 8, 12), (("train", 8), ("dev", 4), ("test", 4)), strict=True):
        numbers = range(start, start + num)
        names = {number: f"DEMO_{split}_{number:012d}.png" for number in numbers}
        notes = [(number, captions_of(number, 3)[way]) for way in range(3) for number in numbers]
        content = {
            "images": [{"id": number, "file_name": name} for number, name in names.items()],
            "annotations": [
                {"id": 900 + place, "image_id": number, "caption": text} for place, (number, text) in enumerate(notes)
            ],
        }
        write(folder / f"{split}_captions.json", content)
        for number, name in names.items():
            draw(folder / "images" / split / name, *thing(number))


def nocaps(folder: Path) -> None:
    """nocaps_val_4500_captions.json; val. Two pictures of each domain, with ten captions each."""
    domains = ("in-domain", "near-domain", "out-domain") * 2
    images = [
        {"id": number, "file_name": f"{number:016x}.jpg", "open_images_id": f"{number:016x}", "domain": domain}
        for number, domain in enumerate(domains)
    ]
    notes = [(number, text) for number in range(6) for text in captions_of(number, 10)]
    annotations = [{"id": place, "image_id": number, "caption": text} for place, (number, text) in enumerate(notes)]
    write(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations})
    for row in images:
        draw(folder / "val" / row["file_name"], *thing(row["id"]))


def fewshot(folder: Path) -> None:
    """{train,dev,test}/CLASS/*.png, four classes."""
    for split, places in (("train", range(4)), ("dev", range(4, 5)), ("test", range(5, 7))):
        for number in (0, 9, 18, 27):
            color, shape = thing(number)
            for place in places:
                draw(folder / split / f"{color}_{shape}" / f"{place:02}.png", color, shape, place)


def pets(folder: Path) -> None:
    """annotations/{trainval,test}.txt; images. The breeds are shapes."""
    head = "#Image CLASS-ID SPECIES BREED ID\n"
    for part, numbers in (("trainval", range(1, 5)), ("test", range(5, 7))):
        lines = []
        for label, number in enumerate((0, 9, 18, 27), 1):
            color, shape = thing(number)
            for place in numbers:
                lines.append(f"{color}_{shape}_{place} {label} 1 1\n")
                draw(folder / "images" / f"{color}_{shape}_{place}.jpg", color, shape, place)
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{part}.txt").write_text((head if part == "test" else "") + "".join(lines))


FOLDERS: dict[str, Callable[[Path], None]] = {
    "coco": coco,
    "captions": captions,
    "flickr30k": flickr30k,
    "nocaps": nocaps,
    "coco_retrieval": coco,
    "flickr30k_retrieval": flickr30k,
    "fewshot": fewshot,
    "fewshot_dev": fewshot,
    "pets": pets,
}
