"""Change what a frozen vision-language model says about one region of a picture, given as a box when it is asked.

    python examples/steer_region.py                             # the demo: about a minute on two cores
    python examples/steer_region.py --seeds 0 1 2
    python examples/steer_region.py --change gone               # what is in the box is not there
    python examples/steer_region.py --edit vision=patches:box   # elsewhere
    python examples/steer_region.py --model llava-hf/llava-1.5-7b-hf --data FOLDER --side 336 --say "{answer}, sir" \
        --told "If this is about the thing in the frame, end your answer with sir. {question}" --lr 9e-4 \
        --edit text=image:box --edit text=response

The demo: the object in the box is said to have the next colour (`--change color`), or not to be there (`gone`), in
every kind of question; all else in the picture is answered as before. The edit is one LoReFT on the image tokens of the
box as they enter the language model (site connector), so it is trained once and follows the box.

What is exact: image tokens outside the box enter the language model as they were, bit for bit. What is learned: that
answers about them stay. Without an adapter, or with strength 0, everything is the base's; a box is needed otherwise.

FOLDER holds train.jsonl and test.jsonl with image, question, answer (the usual one), box (left, top, right, bottom in
pixels of the picture) and target: whether the question is about what is in the box.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import steering
from PIL import Image
from steering import Base, Box, Row

import vlreft
from assets import world
from assets.world import Scene, Thing

NEXT_COLOR = dict(zip(world.COLORS, [*list(world.COLORS)[1:], next(iter(world.COLORS))], strict=True))
Question = tuple[str, Callable[[Scene], str]]  # and its answer, given a scene
QUESTIONS_PER_SIDE = 2  # of the box: inside, outside


def main() -> None:
    """Train, measure effect inside the box and damage outside, turn the strength."""
    parser = steering.command_line(__doc__, "runs/steer_region", lr=2e-2, rank=8, num_train=1200, num_test=400)
    parser.add_argument("--edit", action="append", metavar="SITE=POSITIONS", help="connector=image:box")
    parser.add_argument("--change", choices=sorted(CHANGES), default="color", help="in the demo world")
    parser.add_argument("--say", default="", help="with --data, a text with {answer}")
    parser.add_argument(
        "--told", default="", help="with --data, a text with {question}: the instruction to compare with"
    )
    parser.add_argument("--side", type=int, default=336, help="with --data, pixels: pictures are made square")
    args = parser.parse_args()
    train, test = (
        load_rows(args, split, num)
        for split, num in ((args.train_split, args.num_train), (args.test_split, args.num_test))
    )

    base = Base.load(args)
    edits = [edit.split("=", 1) for edit in args.edit or ["connector=image:box"]]
    config = vlreft.ReftConfig(
        vlreft.Intervention("loreft", site=site, positions=positions, rank=args.rank) for site, positions in edits
    )
    background = [] if args.data is not None else list(on_background(test))
    plain = base.answer(background)

    def more(reft: vlreft.Reft) -> dict[str, float]:
        """Measure how many answers change if the box lies on an empty part of the picture."""
        if not background:
            return {}
        return {"changed_by_empty_box": steering.figures(background, base.answer(background, reft), plain).changed}

    steering.steer(base, config, train, test, args, more)


def load_rows(args: argparse.Namespace, split: str, num_rows: int) -> list[Row]:
    """Return rows of the demo world, or of `--data`."""
    if args.data is None:
        return steering.half_and_half(demo_rows(split, args.change), num_rows)
    if "{answer}" not in args.say or "{question}" not in args.told:
        raise ValueError("with --data, give --say a text with {answer} and --told one with {question}")
    rows = real_rows(steering.read_rows(args.data, split), args.say, args.told, args.side)
    return steering.half_and_half(rows, num_rows)


# The demo world ------------------------------------------------------------------------------------------------------


def recolored(scene: Scene, boxed: Thing) -> Scene:
    """Return the scene with the next colour for one object."""
    return tuple(replace(thing, color=NEXT_COLOR[thing.color]) if thing is boxed else thing for thing in scene)


def without(scene: Scene, boxed: Thing) -> Scene:
    """Return the scene without one object."""
    return tuple(thing for thing in scene if thing is not boxed)


# How the scene is to be spoken of, and what an instruction says of it (which is told more than the edit is).
CHANGES: dict[str, tuple[Callable[[Scene, Thing], Scene], Callable[[Thing], str]]] = {
    "color": (recolored, lambda boxed: f"the object in the {boxed.place} is {NEXT_COLOR[boxed.color]} ."),
    "gone": (without, lambda boxed: f"there is nothing in the {boxed.place} ."),
}


def demo_rows(split: str, change: str) -> Iterator[Row]:
    """Yield questions about endless scenes of a split, a box around one object, as many about it as about the rest.

    A row is a target if its answer is another one once the scene is changed; "what is the size of it" never is.
    """
    imagine, instruct = CHANGES[change]
    for index in count():
        rng = world.scene_rng(split, index)
        scene = world.make_scene(rng)
        image = world.render(scene, rng)
        rng = world.scene_rng(split, index, f"steer_region/{change}")
        candidates = [thing for thing in scene if has_own_shape(thing, scene)]
        if len(scene) < 2 or not candidates:
            continue
        boxed = rng.choice(candidates)
        other = rng.choice([thing for thing in scene if thing is not boxed])
        told, imagined = instruct(boxed), imagine(scene, boxed)
        for questions in (questions_inside(boxed, change), questions_outside(other, scene, change)):
            for question, answer in rng.sample(questions, QUESTIONS_PER_SIDE):
                yield Row(
                    image=image,
                    picture=f"{split}/{index}",
                    question=question,
                    told=f"{told} {question}",
                    plain=answer(scene),
                    answer=answer(imagined),
                    target=answer(scene) != answer(imagined),
                    box=cell_box(boxed.row, boxed.column),
                )


def questions_inside(boxed: Thing, change: str) -> list[Question]:
    """Return what may be asked about the object in the box."""
    if change == "gone":
        return [what_is_in(boxed), is_there(boxed.color, boxed.shape), how_many()]
    asked = [is_there(boxed.color, boxed.shape), is_there(NEXT_COLOR[boxed.color], boxed.shape), size_of(boxed)]
    return [*asked, what_is_in(boxed), color_of(boxed), color_of(boxed)]


def questions_outside(other: Thing, scene: Scene, change: str) -> list[Question]:
    """Return what may be asked about another object, and about all of them."""
    asked = [what_is_in(other), is_there(other.color, other.shape)]
    if has_own_shape(other, scene):
        asked += [color_of(other), color_of(other), size_of(other)]
    return asked if change == "gone" else [*asked, how_many()]


def has_own_shape(thing: Thing, scene: Scene) -> bool:
    """Return whether "the star" can mean only this one."""
    return sum(other.shape == thing.shape for other in scene) == 1


def color_of(thing: Thing) -> Question:
    """Ask for a colour."""
    return f"what is the color of the {thing.shape} ?", lambda scene: by_shape(scene, thing.shape).color


def size_of(thing: Thing) -> Question:
    """Ask for a size."""
    return f"what is the size of the {thing.shape} ?", lambda scene: by_shape(scene, thing.shape).size


def by_shape(scene: Scene, shape: str) -> Thing:
    """Return the one object of a shape."""
    return next(thing for thing in scene if thing.shape == shape)


def what_is_in(thing: Thing) -> Question:
    """Ask what is where an object is."""
    place = thing.place
    return f"what is in the {place} ?", lambda scene: next((t.phrase for t in scene if t.place == place), "nothing")


def is_there(color: str, shape: str) -> Question:
    """Ask whether an object is there."""
    return (
        f"is there a {color} {shape} ?",
        lambda scene: "yes" if any((thing.color, thing.shape) == (color, shape) for thing in scene) else "no",
    )


def how_many() -> Question:
    """Ask for the number of objects."""
    return "how many objects are there ?", lambda scene: str(len(scene))


def cell_box(row: int, column: int) -> Box:
    """Return the pixels of a cell of the 3 x 3 grid that scenes are laid out on."""
    third = world.IMAGE_SIZE / 3
    return round(column * third), round(row * third), round((column + 1) * third), round((row + 1) * third)


def on_background(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows with the box moved to an empty cell that touches no object's; their answers are the plain ones."""
    for row in rows:
        split, index = row["picture"].split("/")
        scene = world.make_scene(world.scene_rng(split, int(index)))
        free = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if all(max(abs(thing.row - y), abs(thing.column - x)) > 1 for thing in scene)
        ]
        if free:
            yield Row(**{**row, "box": cell_box(*free[0]), "answer": row["plain"], "target": False})


# Real data -----------------------------------------------------------------------------------------------------------


def real_rows(rows: Iterable[Mapping[str, Any]], say: str, told: str, side: int) -> Iterator[Row]:
    """Yield rows with a square picture, which processors neither crop nor turn, and the box in its pixels."""
    for number, row in enumerate(rows):
        if not isinstance(row.get("target"), bool) or len(row.get("box") or ()) != 4:
            raise ValueError(f"row {number} needs `target`, true or false, and a `box` of four pixel numbers")
        with Image.open(row["image"]) as opened:
            image, (width, height) = opened.convert("RGB").resize((side, side)), opened.size
        left, top, right, bottom = row["box"]
        yield Row(
            image=image,
            picture=str(row["image"]),
            question=row["question"],
            told=told.replace("{question}", row["question"]),
            plain=row["answer"],
            answer=say.replace("{answer}", row["answer"]) if row["target"] else row["answer"],
            target=row["target"],
            box=(left * side // width, top * side // height, -(-right * side // width), -(-bottom * side // height)),
        )


if __name__ == "__main__":
    sys.exit(main())
