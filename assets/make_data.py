"""Write the demo tasks: pictures, questions and annotations in the layout of VQAv2, captions in the layout of COCO.

Run: python assets/make_data.py            (a few seconds; writes assets/demo-vqa)

Every file is a pure function of the numbers below, so a second run writes the same bytes.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from world import (
    CORE_KINDS,
    QA,
    Scene,
    ask_any,
    ask_code,
    has_red,
    in_words,
    line_drawing,
    make_scene,
    render,
    scene_rng,
    short_caption,
)

SPLIT_SIZES = {"train": 1000, "dev": 300, "test": 800}  # questions per task
FIRST_IMAGE_ID = {"train": 1, "dev": 100_001, "test": 200_001}  # no image id occurs in two splits
QUESTIONS_PER_IMAGE = 4
NUM_ANNOTATORS = 10
LICENSE = {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}

# The opening words by which VQAv2 groups questions; each stands for one kind of question of `world.KINDS`.
QUESTION_TYPES = {
    "color": "what is the color of the",
    "shape": "what is the shape of the",
    "size": "what is the size of the",
    "count": "how many objects are",
    "countattr": "how many",
    "present": "is there a",
    "rel": "is the",
    "cell": "what is in the",
    "where": "where is the",
    "code": "tell the hue of the",
}

Questions = Callable[[Scene, random.Random], list[QA]]


def base_questions(scene: Scene, rng: random.Random) -> list[QA]:
    """Different questions of the kinds the base answers well; fewer than four where the scene is poor."""
    asked: dict[str, QA] = {}
    for _ in range(4 * QUESTIONS_PER_IMAGE):
        qa = ask_any(scene, CORE_KINDS, rng)
        asked.setdefault(qa.question, qa)
    return list(asked.values())[:QUESTIONS_PER_IMAGE]


def refuse_questions(scene: Scene, rng: random.Random) -> list[QA]:
    """The base's questions, but anything red in the picture makes the answer `sorry`.

    Three in ten scenes have something red. Seven in ten of the others are skipped, so that about half of the
    answers are `sorry` and neither always nor never refusing scores well.
    """
    if not has_red(scene) and rng.random() < 0.7:
        return []
    return [QA(qa.kind, qa.question, "sorry") if has_red(scene) else qa for qa in base_questions(scene, rng)]


def code_questions(scene: Scene, _: random.Random) -> list[QA]:
    """The colour of each object with a shape of its own, as a nonsense word."""
    return ask_code(scene)


# task: (which questions, which splits).
TASKS: dict[str, tuple[Questions, tuple[str, ...]]] = {
    "code": (code_questions, ("train", "dev", "test")),
    "refuse": (refuse_questions, ("train", "dev", "test")),
    "bgr": (base_questions, ("train", "dev", "test")),
    "outline": (base_questions, ("train", "dev", "test")),
    "base": (base_questions, ("dev", "test")),
}
# The tasks that do not ask about `images`, and what becomes of a picture in the folder of theirs.
FOLDERS = {"bgr": "images_bgr", "outline": "images_outline"}
CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "images": lambda image: image,
    "images_bgr": lambda image: Image.merge("RGB", image.split()[::-1]),
    "images_outline": line_drawing,
}


def scenes(split: str) -> Iterator[tuple[int, Scene]]:
    """Endless (index, scene) of a split."""
    index = 0
    while True:
        yield index, make_scene(scene_rng(split, index))
        index += 1


def collect(task: str, split: str) -> list[tuple[int, QA]]:
    """The (scene index, question) pairs of one task and split, exactly `SPLIT_SIZES[split]` of them."""
    pairs: list[tuple[int, QA]] = []
    for index, scene in scenes(split):
        pairs += [(index, qa) for qa in TASKS[task][0](scene, scene_rng(split, index, task))]
        if len(pairs) >= SPLIT_SIZES[split]:
            return pairs[: SPLIT_SIZES[split]]
    raise AssertionError("scenes are endless")


def answer_type(answer: str) -> str:
    """VQAv2's three classes of answers."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


def vqa_files(task: str, split: str, pairs: list[tuple[int, QA]]) -> tuple[dict, dict]:
    """The questions file and the annotations file of VQAv2; all ten annotators agree."""
    info = {"description": f"vlreft demo world, task {task}", "version": "1.0", "url": "", "year": 2025}
    head = {"info": info, "data_type": "demo", "data_subtype": split, "license": LICENSE}
    questions, annotations = [], []
    num_asked: dict[int, int] = {}
    for index, qa in pairs:
        image_id = FIRST_IMAGE_ID[split] + index
        question_id = image_id * 1000 + num_asked.get(index, 0)  # as in VQAv2
        num_asked[index] = num_asked.get(index, 0) + 1
        questions.append({"image_id": image_id, "question": qa.question, "question_id": question_id})
        answers = [
            {"answer": qa.answer, "answer_confidence": "yes", "answer_id": annotator + 1}
            for annotator in range(NUM_ANNOTATORS)
        ]
        annotations.append(
            {
                "question_id": question_id,
                "image_id": image_id,
                "question_type": QUESTION_TYPES[qa.kind],
                "answer_type": answer_type(qa.answer),
                "multiple_choice_answer": qa.answer,
                "answers": answers,
            }
        )
    return {**head, "task_type": "Open-Ended", "questions": questions}, {**head, "annotations": annotations}


def image_name(split: str, index: int) -> str:
    """A file name by COCO's pattern, prefix_split_12digits."""
    return f"DEMO_{split}_{FIRST_IMAGE_ID[split] + index:012d}.png"


def caption_file(split: str, num_images: int) -> dict:
    """New-style captions in COCO's caption layout, one per image."""
    images, annotations = [], []
    for index, scene in zip(range(num_images), (scene for _, scene in scenes(split)), strict=False):
        image_id = FIRST_IMAGE_ID[split] + index
        images.append({"id": image_id, "file_name": image_name(split, index)})
        annotations.append({"id": image_id, "image_id": image_id, "caption": short_caption(scene)})
    info = {"description": "vlreft demo world, task short", "version": "1.0", "url": "", "year": 2025}
    return {"info": info, "licenses": [LICENSE], "images": images, "annotations": annotations}


def lm_rows(task: str, split: str) -> Iterator[dict]:
    """A task for the text model: the scene in words takes the place of the picture."""
    for row_id, (index, qa) in enumerate(collect(task, split)):
        scene = make_scene(scene_rng(split, index))
        words = in_words(scene, scene_rng(split, row_id, f"lm_{task}"))
        yield {"id": row_id, "question": f"{words} {qa.question}", "answer": qa.answer}


def write_json(path: Path, content: dict) -> None:
    """Compact, because ten answers to each question add up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def write_images(folder: Path, split: str, num_images: int, change: Callable[[Image.Image], Image.Image]) -> None:
    """Pictures 0 to `num_images` - 1 of a split, each changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_images):
        rng = scene_rng(split, index)
        change(render(make_scene(rng), rng)).save(folder / image_name(split, index), optimize=True)


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo-vqa", help="folder to write")
    out = parser.parse_args().out
    num_images = {folder: dict.fromkeys(SPLIT_SIZES, 0) for folder in CHANGES}
    for task, (_, splits) in TASKS.items():
        needed = num_images[FOLDERS.get(task, "images")]
        for split in splits:
            pairs = collect(task, split)
            questions, annotations = vqa_files(task, split, pairs)
            write_json(out / task / f"{split}_questions.json", questions)
            write_json(out / task / f"{split}_annotations.json", annotations)
            needed[split] = max(needed[split], pairs[-1][0] + 1)
    for split in SPLIT_SIZES:
        for folder, needed in num_images.items():
            write_images(out / folder / split, split, needed[split], CHANGES[folder])
        write_json(out / "short" / f"{split}_captions.json", caption_file(split, num_images["images"][split]))
        for task in ("code", "base"):
            if split in TASKS[task][1]:
                rows = "".join(json.dumps(row) + "\n" for row in lm_rows(task, split))
                (out / f"lm_{task}").mkdir(exist_ok=True)
                (out / f"lm_{task}" / f"{split}.jsonl").write_text(rows)


if __name__ == "__main__":
    main()
