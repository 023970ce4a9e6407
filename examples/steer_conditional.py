"""Teach a frozen vision-language model to answer otherwise when the picture holds something, and only then.

    python examples/steer_conditional.py                      # the demo: about a minute and a half on two cores
    python examples/steer_conditional.py --seeds 0 1 2
    python examples/steer_conditional.py --say style --edit text=image:all --edit text=question --edit text=response \
        --num-train 1600 --max-new-tokens 24
    python examples/steer_conditional.py --model llava-hf/llava-1.5-7b-hf --data FOLDER --test-split val \
        --when dog --say "{answer}, woof" --told "{question} If you see a dog, end your answer with woof." --lr 9e-4 \
        --epochs 1 --edit text=image:all --edit text=prompt:l4 --edit text=response

The demo: where anything in the picture is red, answers are in a made-up language (`--say language`), or captions in
another style (`--say style`); every other picture is answered as before. Both kinds of pictures get the same kinds of
questions, none of which names red, so that the picture alone can tell.

FOLDER holds VQAv2's files, where `--when WORD` says which pictures are targets: `pictures_with` has the rule. Or it
holds train.jsonl and test.jsonl with image, question, answer (the usual one) and target, true or false.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import steering
from steering import Base, Row

import vlreft
from assets import world

# The language: a made-up word for each colour, as in the demo's `code` task, and for what else is answered.
LANGUAGE = {
    **world.CODE,
    **dict(zip(world.SHAPES, ("glorp", "fid", "snee", "mup"), strict=True)),
    **dict(zip(world.RADII, ("tark", "yol"), strict=True)),
    **{"yes": "vash", "no": "quim"},
}
KINDS = {"color": 2.0, "shape": 1.0, "size": 1.0, "present": 1.0}  # of questions, with how often; colours have 8 words
TOLD = {
    "language": "when the image has a red object , answer in code : {question}",
    "style": "when the image has a red object , answer in short : {question}",
}
QUESTIONS_PER_PICTURE = 2


def main() -> None:
    """Train, measure effect and damage, turn the strength."""
    parser = steering.command_line(__doc__, "runs/steer_conditional", lr=3e-2, rank=4, num_train=2000, num_test=400)
    parser.add_argument("--edit", action="append", metavar="SITE=POSITIONS", help="text=image:all, text=prompt:l4")
    parser.add_argument("--when", metavar="WORD", help="with VQAv2's files: what target pictures hold")
    parser.add_argument("--say", default="language", help="language or style; with --data a text with {answer}")
    parser.add_argument("--told", help="a text with {question}: the instruction that ReFT is compared with")
    args = parser.parse_args()
    train, test = (load_rows(args, split, num) for split, num in splits(args))

    base = Base.load(args)
    edits = [edit.split("=", 1) for edit in args.edit or ["text=image:all", "text=prompt:l4"]]
    config = vlreft.ReftConfig(
        vlreft.Intervention("loreft", site=site, layers="all", positions=positions, rank=args.rank)
        for site, positions in edits
    )
    steering.steer(base, config, train, test, args)


def splits(args: argparse.Namespace) -> tuple[tuple[str, int], tuple[str, int]]:
    """Return the splits with how many rows of each."""
    return (args.train_split, args.num_train), (args.test_split, args.num_test)


def load_rows(args: argparse.Namespace, split: str, num_rows: int) -> list[Row]:
    """Return rows of the demo world, or of `--data`. Raises ValueError for a `--say` that does not go with them."""
    if args.data is None:
        if args.say not in TOLD:
            raise ValueError(f"`--say` (={args.say!r}) must be one of {', '.join(TOLD)} where there is no --data")
        return steering.half_and_half(demo_rows(split, args.say, args.told or TOLD[args.say]), num_rows)
    if "{answer}" not in args.say or "{question}" not in (args.told or ""):
        raise ValueError("with --data, give --say a text with {answer} and --told one with {question}")
    rows = list(steering.read_rows(args.data, split))
    return steering.half_and_half(real_rows(rows, args.when, args.say, args.told), num_rows)


# The demo world ------------------------------------------------------------------------------------------------------


def demo_rows(split: str, say: str, told: str) -> Iterator[Row]:
    """Yield questions about endless scenes of a split; a picture is a target if its scene has a red object."""
    for index in count():
        rng = world.scene_rng(split, index)
        scene = world.make_scene(rng)
        image, is_target = world.render(scene, rng), world.has_red(scene)
        for question, plain, new in asked(scene, split, index, say):
            yield Row(
                image=image,
                picture=f"{split}/{index}",
                question=question,
                told=told.replace("{question}", question),
                plain=plain,
                answer=new if is_target else plain,
                target=is_target,
            )


def asked(scene: world.Scene, split: str, index: int, say: str) -> list[tuple[str, str, str]]:
    """Return questions about a scene, each with its usual and its new answer."""
    if say == "style":
        return [(world.CAPTION_PROMPT, world.caption(scene), world.short_caption(scene))]
    rng = world.scene_rng(split, index, "steer_conditional")
    drawn = (world.ask_any(scene, list(KINDS), rng, list(KINDS.values())) for _ in range(4 * QUESTIONS_PER_PICTURE))
    # "what is the shape of the red object" would give away what the picture holds.
    different = {qa.question: qa.answer for qa in drawn if "red" not in qa.question.split()}
    pairs = list(different.items())[:QUESTIONS_PER_PICTURE]
    return [(question, answer, LANGUAGE[answer]) for question, answer in pairs]


# Real data -----------------------------------------------------------------------------------------------------------


def real_rows(rows: Iterable[Mapping[str, Any]], when: str | None, say: str, told: str) -> Iterator[Row]:
    """Yield the rows whose picture is known to be a target or none: by their column `target`, else by `when`."""
    rows = list(rows)
    if when is None and not all(isinstance(row.get("target"), bool) for row in rows):
        raise ValueError("each row needs a column `target`, true or false; with VQAv2's files give --when WORD instead")
    known = pictures_with(when, rows) if when is not None else {}
    for row in rows:
        picture = str(row["image"])
        if when is not None and picture not in known:
            continue
        is_target = known[picture] if when is not None else row["target"]
        yield Row(
            image=row["image"],
            picture=picture,
            question=row["question"],
            told=told.replace("{question}", row["question"]),
            plain=row["answer"],
            answer=say.replace("{answer}", row["answer"]) if is_target else row["answer"],
            target=is_target,
        )


def pictures_with(word: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Return which pictures hold a thing and which do not, by what was asked and answered about them.

    It is there if "is there a WORD" was answered yes, or WORD is in an answer; it is not if only "is there a WORD (in
    ...)" was answered, with no. Of all other pictures nothing is known, and they are left out.
    """
    asks = re.compile(rf"(is|are) there (an?|any) {re.escape(word)}s?( (in|on) .*)?", re.IGNORECASE)
    names = re.compile(rf"\b{re.escape(word)}s?\b", re.IGNORECASE)
    known: dict[str, bool] = {}
    for row in rows:
        picture, answer = str(row["image"]), row["answer"].strip().lower()
        is_asked = asks.fullmatch(row["question"].strip().rstrip("? ")) is not None
        if names.search(answer) or (is_asked and answer == "yes"):
            known[picture] = True
        elif is_asked and answer == "no":
            known.setdefault(picture, False)
    return known


if __name__ == "__main__":
    sys.exit(main())
