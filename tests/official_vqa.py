"""Small data sets in the official form of each task that asks about a picture, in the demo world's words."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from official_captions import SHAPES, draw, thing, write

# The numbers of the pictures that a part has; three questions are asked about each.
TRAIN, VAL, TEST = range(8), range(8, 10), range(16, 18)


def asked(number: int) -> list[tuple[str, str]]:
    """Return three questions about a numbered picture, and their answers."""
    color, shape = thing(number)
    other = "square" if shape != "square" else "star"
    return [
        (f"what is the shape of the {color} object ?", shape),
        (f"is there a {color} {shape} ?", "yes"),
        (f"is there a {color} {other} ?", "no"),
    ]


def questions(numbers: range) -> Iterator[tuple[int, int, str, str]]:
    """Yield each question's number and its picture's, the question, and its answer."""
    for number in numbers:
        for place, (question, answer) in enumerate(asked(number)):
            yield 1000 * (number + 1) + place, number, question, answer


def annotators(answer: str, **extra: Any) -> list[dict[str, Any]]:
    """Return ten answers: eight times this one, then two others."""
    texts = [answer] * 8 + ["nothing", "white"]
    return [{"answer_id": place, "answer": text, **extra} for place, text in enumerate(texts, 1)]


def pictures(numbers: range, place: Path, name: str) -> None:
    """Save the pictures; `name` has a place for the number."""
    for number in numbers:
        draw(place / name.format(number), *thing(number))


def coco_questions(folder: Path, files: tuple[str, str], part: str, numbers: range, **extra: Any) -> None:
    """VQA's pair of files. Extra fields of the annotations are filled in with the answer."""
    asks, notes = [], []
    for name, image, question, answer in questions(numbers):
        asks.append({"image_id": image, "question": question, "question_id": name})
        entries = annotators(answer, answer_confidence="yes")
        own = {key: answer for key in extra}
        notes.append({"question_id": name, "image_id": image, "answer_type": "other", "answers": entries, **own})
    write(folder / files[0].format(part), {"info": {}, "task_type": "Open-Ended", "questions": asks})
    write(folder / files[1].format(part), {"info": {}, "annotations": notes[::-1]})
    pictures(numbers, folder / f"{part}2014", f"COCO_{part}2014_{{:012d}}.jpg")


def vqav2(folder: Path) -> None:
    """v2_OpenEnded_mscoco_*_questions.json, v2_mscoco_*_annotations.json; train2014 and val2014."""
    files = "v2_OpenEnded_mscoco_{}2014_questions.json", "v2_mscoco_{}2014_annotations.json"
    for part, numbers in (("train", TRAIN), ("val", VAL)):
        coco_questions(folder, files, part, numbers, multiple_choice_answer=True)


def okvqa(folder: Path) -> None:
    """OpenEnded_mscoco_*_questions.json, mscoco_*_annotations.json; train2014 and val2014."""
    files = "OpenEnded_mscoco_{}2014_questions.json", "mscoco_{}2014_annotations.json"
    for part, numbers in (("train", TRAIN), ("val", VAL)):
        coco_questions(folder, files, part, numbers)


def gqa(folder: Path) -> None:
    """*_balanced_questions.json of train, val and testdev; images."""
    for part, numbers in (("train", TRAIN), ("val", TEST), ("testdev", VAL)):
        rows = {}
        for name, image, question, answer in questions(numbers):
            types = {"detailed": "existC", "semantic": "obj", "structural": "query" if name % 1000 == 0 else "verify"}
            rows[f"{name:08d}"] = {
                **{"question": question, "imageId": f"n{image}", "answer": answer, "isBalanced": True},
                **{"types": types, "fullAnswer": answer, "entailed": [], "equivalent": [f"{name:08d}"]},
            }
        write(folder / f"{part}_balanced_questions.json", rows)
        pictures(numbers, folder / "images", "n{}.jpg")


def textvqa(folder: Path) -> None:
    """TextVQA_0.5.1_*.json; train_images has the pictures of both parts."""
    for part, numbers in (("train", TRAIN), ("val", VAL)):
        rows = [
            {
                **{"question_id": name, "question": question, "image_id": f"{image:016x}", "set_name": part},
                **{"answers": [entry["answer"] for entry in annotators(answer)], "image_width": 64},
            }
            for name, image, question, answer in questions(numbers)
        ]
        write(folder / f"TextVQA_0.5.1_{part}.json", {"dataset_type": part, "dataset_version": "0.5.1", "data": rows})
        pictures(numbers, folder / "train_images", "{:016x}.jpg")


def vizwiz(folder: Path) -> None:
    """train.json and val.json; train and val. Each picture has one question."""
    for part, numbers in (("train", range(24)), ("val", range(24, 30))):
        name = f"VizWiz_{part}_{{:08d}}.jpg"
        rows = []
        for number in numbers:
            question, answer = asked(number)[number % 3]
            answers = [{"answer": a["answer"], "answer_confidence": "yes"} for a in annotators(answer)]
            row = {"image": name.format(number), "question": question, "answers": answers}
            rows.append({**row, "answer_type": "other", "answerable": 1})
        write(folder / f"{part}.json", rows)
        pictures(numbers, folder / part, name)


def scienceqa(folder: Path) -> None:
    """problems.json, pid_splits.json, images/PART/PID/image.png; the last problem of each part has no picture."""
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    for part, numbers in (("train", TRAIN), ("val", TEST), ("test", VAL)):
        splits[part] = []
        for name, number, question, answer in questions(numbers):
            choices = list(SHAPES) if answer in SHAPES else ["yes", "no"]
            hint = "look at the object ." if name % 1000 == 0 else ""
            row = {"question": question, "choices": choices, "answer": choices.index(answer), "hint": hint}
            problems[str(name)] = {**row, "image": "image.png", "split": part, "subject": "natural science"}
            splits[part].append(str(name))
            draw(folder / "images" / part / str(name) / "image.png", *thing(number))
        last = str(len(problems))
        problems[last] = {"question": "is red red ?", "choices": ["yes", "no"], "answer": 0, "hint": "", "image": None}
        splits[part].append(last)
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {**splits, "minitest": splits["test"][:2]})


def pope(folder: Path) -> None:
    """coco_pope_*.json, a JSON object a line, about the same pictures; val2014."""
    for part in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": place, "image": f"COCO_val2014_{image:012d}.jpg", "text": question, "label": answer}
            for place, (_, image, question, answer) in enumerate(questions(range(8, 12)), 1)
            if answer in ("yes", "no")
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{part}.json").write_text(lines)
    pictures(range(8, 12), folder / "val2014", "COCO_val2014_{:012d}.jpg")


def aokvqa(folder: Path) -> None:
    """aokvqa_v1p0_*.json; train2017 and val2017. Every third question is not for direct answers."""
    for part, numbers in (("train", TRAIN), ("val", VAL)):
        rows = []
        for name, image, question, answer in questions(numbers):
            choices = list(SHAPES) if answer in SHAPES else ["large", "yes", "no", "small"]
            row = {"split": part, "image_id": image, "question_id": f"q{name}", "question": question}
            answers = [entry["answer"] for entry in annotators(answer)]
            row |= {"choices": choices, "correct_choice_idx": choices.index(answer), "direct_answers": answers}
            rows.append({**row, "difficult_direct_answer": name % 1000 == 2, "rationales": ["look ."]})
        write(folder / f"aokvqa_v1p0_{part}.json", rows)
        pictures(numbers, folder / f"{part}2017", "{:012d}.jpg")


FOLDERS: dict[str, Callable[[Path], None]] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "okvqa": okvqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "scienceqa": scienceqa,
    "pope": pope,
    "aokvqa": aokvqa,
}
LABELLED = {  # the files with the labels of the first test part
    "vqav2": ["v2_mscoco_val2014_annotations.json"],
    "okvqa": ["mscoco_val2014_annotations.json"],
    "gqa": ["testdev_balanced_questions.json"],
    "textvqa": ["TextVQA_0.5.1_val.json"],
    "vizwiz": ["val.json"],
    "scienceqa": ["problems.json"],
    "pope": ["coco_pope_random.json"],
    "aokvqa": ["aokvqa_v1p0_val.json"],
}
QUESTIONS = {  # the files that name the pictures first, then what else is read
    **LABELLED,
    "scienceqa": ["problems.json", "pid_splits.json"],
    "vqav2": ["v2_OpenEnded_mscoco_val2014_questions.json"],
    "okvqa": ["OpenEnded_mscoco_val2014_questions.json"],
}
