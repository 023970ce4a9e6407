"""The two adapters that `app.py` trains for the demo model when it is started without any.

`code` answers in words that the base has never used, where it is asked to. `paint-blue` edits the patches in a box:
what lies in it is called blue. About half of what each learns from are questions whose answers have to stay.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ASSETS
from PIL import Image

import vlreft

sys.path.append(str(ASSETS.parent))  # the demo world, which knows what lies where in a picture
from assets.world import CORE_KINDS, IMAGE_SIZE, RADII, Scene, Thing, ask_any, ask_code, make_scene, render, scene_rng

Box = tuple[int, int, int, int]
BATCH_SIZE = 16
LEARNING_RATE = 1e-2


class Row(NamedTuple):
    """A picture, a box on it in pixels, a question, the answer to learn, and whether the base would give another."""

    image: Image.Image
    box: Box
    question: str
    answer: str
    changes: bool


class Lesson(NamedTuple):
    """What an adapter is, how long it is trained and on what."""

    intervention: vlreft.Intervention
    num_steps: int
    rows: Callable[[str], Iterator[Row]]


def demo_adapters(model: Any, processor: Any, folder: Path) -> dict[str, Path]:
    """Return the folders of the two adapters, trained first where `folder` lacks them. The model is left as it was."""
    for name, lesson in LESSONS.items():
        if not (folder / name / "reft_model.safetensors").is_file():
            print(
                f"training the demo adapter '{name}', about half a minute, this once; kept in {folder / name}",
                flush=True,
            )
            reft = train(model, processor, name, lesson)
            reft.save_pretrained(folder / name)
            reft.detach()
    return {name: folder / name for name in LESSONS}


def train(model: Any, processor: Any, name: str, lesson: Lesson) -> vlreft.Reft:
    """Attach a new adapter and train it: AdamW, one cycle, each row seen once. The model stays in evaluation mode."""
    torch.manual_seed(0)
    reft = vlreft.attach(model, vlreft.ReftConfig(lesson.intervention), name)
    optimizer = torch.optim.AdamW(reft.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, lesson.num_steps, pct_start=0.1)
    collator, rows = vlreft.Collator(processor), lesson.rows("train")
    for _ in range(lesson.num_steps):
        batch, boxes = collated(collator, [next(rows) for _ in range(BATCH_SIZE)], model.device)
        with reft.boxes(boxes):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return reft


def collated(collator: vlreft.Collator, rows: Sequence[Row], device: Any) -> tuple[dict[str, Any], list[Box]]:
    """Return a training batch and the rows' boxes."""
    batch = collator([{"image": row.image, "question": row.question, "answer": row.answer} for row in rows])
    return {key: value.to(device) for key, value in batch.items()}, [row.box for row in rows]


def code_rows(split: str) -> Iterator[Row]:
    """Yield without end: one question in code, one as the base knows them, about scenes of the demo world."""
    for scene, rng in _scenes(split, "app-code"):
        for qa in [*ask_code(scene)[:1], ask_any(scene, CORE_KINDS, rng)]:
            yield Row(render(scene, rng, noise=4.0), (0, 0, 64, 64), qa.question, qa.answer, qa.kind == "code")


def painted_rows(split: str) -> Iterator[Row]:
    """Yield without end: a box around one object, and a question answered as if that object were blue."""
    for scene, rng in _scenes(split, "app-paint"):
        painted = rng.randrange(len(scene))
        after = tuple(_blue(thing) if place == painted else thing for place, thing in enumerate(scene))
        if (found := _ask_both(scene, after, rng)) is not None:
            yield Row(render(scene, rng, noise=4.0), box_around(scene[painted], rng), *found)


def _scenes(split: str, purpose: str) -> Iterator[tuple[Scene, random.Random]]:
    index = 0
    while True:
        rng = scene_rng(split, index, purpose)
        yield make_scene(rng), rng
        index += 1


def _blue(thing: Thing) -> Thing:
    return Thing(thing.size, "blue", thing.shape, thing.row, thing.column)


def _ask_both(scene: Scene, after: Scene, rng: random.Random) -> tuple[str, str, bool] | None:
    """Ask the same of the scene and of the painted one; more often than not, what tells them apart."""
    wants_change = rng.random() < 0.6
    for _ in range(8):
        state = rng.getstate()
        new = ask_any(after, PAINT_KINDS, rng)
        rng.setstate(state)
        old = ask_any(scene, PAINT_KINDS, rng)
        if new.question == old.question and (new.answer != old.answer) == wants_change:
            return new.question, new.answer, wants_change
    return None


def box_around(thing: Thing, rng: random.Random) -> Box:
    """Return a box (left, top, right, bottom) in pixels around an object, loose by up to two."""
    x, y = ((place + 0.5) * IMAGE_SIZE / 3 for place in (thing.column, thing.row))
    reach = RADII[thing.size]
    left, top = (max(0, round(side - reach - rng.uniform(0, 2))) for side in (x, y))
    right, bottom = (min(IMAGE_SIZE, round(side + reach + rng.uniform(0, 2))) for side in (x, y))
    return left, top, right, bottom


PAINT_KINDS = ("color", "cell", "shape", "present")
LESSONS = {
    "code": Lesson(
        vlreft.Intervention("loreft", site="text", layers="all", positions="prompt:l4", rank=4), 120, code_rows
    ),
    "paint-blue": Lesson(
        vlreft.Intervention("loreft", site="vision", layers="all", positions="patches:box", rank=4), 120, painted_rows
    ),
}
