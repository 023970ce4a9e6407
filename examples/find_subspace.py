"""Which layer and which token hold the colour? Activation patching, then a subspace for the colour alone.

    python examples/find_subspace.py                       # the demo models, pictures and texts: minutes on two cores
    python examples/find_subspace.py --cases text --seeds 0

Two cases: questions about pictures (demo-llava) and about scenes told in words (demo-lm). In each

1. pairs of runs that differ in the colour of one object; the state of the other run is put into this one at every layer
   and place in turn, and the grid shows where the answer follows: `grid_*.png`;
2. pairs of quite different objects. The answer wanted is of this object with the colour of the other. Whole states
   bring all of the other object along; DAS learns a subspace that brings its colour alone. Interchange accuracy on
   held-out pairs, against whole states and a random subspace of the same rank: `results.json`.

The rows are made of the demo world, so `--model` and `--lm` are for models that know it.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import ASSETS, load_base
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

import vlreft
from vlreft.causes.interchange import InterchangeCollator, PatchGrid, interchange_accuracy, patch_grid

sys.path.append(str(ASSETS.parent))  # the demo world is a script beside its data, not an installed package
from assets.world import COLORS, RADII, SHAPES, Scene, Thing, make_scene, render, scene_rng

Row = dict[str, Any]
CENTRE = (1, 1)
OBJECT = "rows[2:6]cols[2:6]"  # the patches of the middle cell, of 8 x 8
WHAT_IS_THERE = "what is in the middle center ?"


@dataclass(frozen=True)
class Place:
    """Where a subspace is looked for: positions of a site and a layer."""

    name: str
    site: str
    layer: int
    positions: str


@dataclass(frozen=True)
class Case:
    """A model, its rows, and where to look.

    minimal, different: make a pair from a generator: that differ in the colour of one object, in all of it. A row has
    what the base answers by itself under `own`. grids: positions to patch by their name in the picture, and the site.
    """

    model: Any
    collator: InterchangeCollator
    minimal: Callable[[random.Random], Row]
    different: Callable[[random.Random], Row]
    grids: dict[str, dict[str, str]]
    places: Sequence[Place]


# Pictures ------------------------------------------------------------------------------------------------------------


def draw_thing(rng: random.Random, unlike: Thing | None = None) -> Thing:
    """Return an object in the middle; of another colour, shape and size than one given."""
    while True:
        thing = Thing(rng.choice(tuple(RADII)), rng.choice(tuple(COLORS)), rng.choice(SHAPES), *CENTRE)
        if unlike is None or not {thing.size, thing.color, thing.shape} & {unlike.size, unlike.color, unlike.shape}:
            return thing


def around(thing: Thing, others: Scene) -> Scene:
    """Return the scene of an object and others, in reading order."""
    return tuple(sorted((*others, thing), key=lambda one: (one.row, one.column)))


def draw_others(rng: random.Random) -> Scene:
    """Return up to two objects beside the middle."""
    return tuple(thing for thing in make_scene(rng) if (thing.row, thing.column) != CENTRE)[:2]


def minimal_pictures(rng: random.Random) -> Row:
    """Two pictures that differ in nothing but the colour of the object in the middle."""
    thing, others, noise = draw_thing(rng), draw_others(rng), rng.getrandbits(32)
    others = tuple(other for other in others if other.shape != thing.shape)
    color = rng.choice([color for color in COLORS if color != thing.color])
    question = f"what is the color of the {thing.shape} ?"
    base, source = around(thing, others), around(replace(thing, color=color), others)
    return {
        "image": render(base, random.Random(noise)),
        "question": question,
        "own": thing.color,
        "answer": color,
        "source": {"image": render(source, random.Random(noise)), "question": question, "answer": color},
    }


def different_pictures(rng: random.Random) -> Row:
    """Two pictures with other objects all over; the answer is the base's object in the source's colour."""
    thing = draw_thing(rng)
    other = draw_thing(rng, unlike=thing)
    return {
        "image": render(around(thing, draw_others(rng)), rng),
        "question": WHAT_IS_THERE,
        "own": thing.phrase,
        "answer": replace(thing, color=other.color).phrase,
        "source": {
            "image": render(around(other, draw_others(rng)), rng),
            "question": WHAT_IS_THERE,
            "answer": other.phrase,
        },
    }


def pictures(model_name: str) -> Case:
    """Return the case of pictures."""
    processor = AutoProcessor.from_pretrained(model_name)
    words = ["what", "is", "the", "color", "of", "the", "SHAPE", "?", "<assistant>"]
    text = {"the object's image tokens": f"image:{OBJECT}", "image tokens above it": "image:rows[0:2]cols[0:8]"}
    text |= {f"{number}: {word}": f"question:[{number}:{number + 1}]" for number, word in enumerate(words)}
    vision = {
        "its patches": f"patches:{OBJECT}",
        "patches above it": "patches:rows[0:2]cols[0:8]",
        "class token": "cls",
    }
    return Case(
        load_base(AutoModelForImageTextToText, model_name),
        InterchangeCollator(vlreft.Collator(processor)),
        minimal_pictures,
        different_pictures,
        {"text": text, "vision": vision},
        [Place("its image tokens, layer 1", "text", 1, f"image:{OBJECT}")],
    )


# Texts ---------------------------------------------------------------------------------------------------------------


def tell(first: Thing, second: Thing, about: Thing) -> str:
    """Return a scene of two objects in words, and a question about one."""
    return f"there is a {first.phrase} , a {second.phrase} . what is the color of the {about.shape} ?"


def minimal_texts(rng: random.Random) -> Row:
    """Two texts that differ in one word, the colour of the object that is asked about."""
    first = draw_thing(rng)
    second = draw_thing(rng, unlike=first)
    color = rng.choice([color for color in COLORS if color not in (first.color, second.color)])
    source = tell(replace(first, color=color), second, first)
    question = tell(first, second, first)
    return {"question": question, "own": first.color, "answer": color, "source": {"question": source, "answer": color}}


def different_texts(rng: random.Random) -> Row:
    """Two texts of other objects; the answer is the colour of the source's first object, whatever its shape."""
    first, other = draw_thing(rng), draw_thing(rng)
    second = draw_thing(rng, unlike=first)
    while other.shape == first.shape or other.color in (first.color, second.color):
        other = draw_thing(rng)
    source = tell(other, draw_thing(rng, unlike=other), other)
    question = tell(first, second, first)
    return {
        "question": question,
        "own": first.color,
        "answer": other.color,
        "source": {"question": source, "answer": other.color},
    }


def texts(model_name: str) -> Case:
    """Return the case of texts."""
    words = "there is a SIZE COLOR SHAPE , a size color shape . what is the color of the SHAPE ? <assistant>".split()
    first = 2  # behind the start token and <user>
    shown = {
        f"{number}: {word}": f"prompt:[{number + first}:{number + first + 1}]" for number, word in enumerate(words)
    }
    phrase = f"prompt:[{words.index('COLOR') + first}:{words.index(',') + first + 1}]"
    return Case(
        load_base(AutoModelForCausalLM, model_name),
        InterchangeCollator(vlreft.Collator(AutoTokenizer.from_pretrained(model_name))),
        minimal_texts,
        different_texts,
        {"text": {"COLOR SHAPE , together": phrase, **shown}},
        [Place("COLOR SHAPE , together, layer 1", "text", 1, phrase)],
    )


# Both ----------------------------------------------------------------------------------------------------------------


def make_pairs(case: Case, make: Callable[[random.Random], Row], split: str, count: int) -> list[Row]:
    """Return pairs whose two runs the base answers right: of the others there is nothing to exchange."""
    rows = [make(scene_rng(split, index, make.__name__)) for index in range(count)]
    collator, kept = case.collator.collator, []
    for start in range(0, count, 50):
        some = rows[start : start + 50]
        said, theirs = say(case, collator, some), say(case, collator, [row["source"] for row in some])
        kept += [
            row
            for row, answer, other in zip(some, said, theirs, strict=True)
            if (answer, other) == (row["own"], row["source"]["answer"])
        ]
    return kept


def say(case: Case, collator: vlreft.Collator, rows: Sequence[Row]) -> list[str]:
    """Return the base's answers."""
    batch = {name: value.to(case.model.device) for name, value in collator.prompts(rows).items()}
    ids = case.model.generate(**batch, max_new_tokens=6, do_sample=False)
    return collator.decode(ids, batch["input_ids"].shape[1])


def measure(
    case: Case, place: Place, rank: int, train: list[Row], test: list[Row], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Return, for each seed, the accuracy on held-out pairs of a random subspace and of one that DAS learned."""
    found: dict[str, list[float]] = {"random": [], "das": []}
    for seed in args.seeds:
        set_seed(seed)
        item = vlreft.Intervention(
            "das",
            site=place.site,
            layers=place.layer,
            positions=place.positions,
            rank=rank,
            init="reference",
        )
        reft = vlreft.attach(case.model, vlreft.ReftConfig(item))
        found["random"].append(interchange_accuracy(case.model, test, case.collator))
        vlreft.ReftTrainer(
            model=case.model,
            args=TrainingArguments(
                str(Path(args.output) / "checkpoints"),
                max_steps=args.steps,
                per_device_train_batch_size=16,
                learning_rate=args.lr,
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                seed=seed,
                use_cpu=case.model.device.type == "cpu",
            ),
            train_dataset=train,
            data_collator=case.collator,
        ).train()
        found["das"].append(interchange_accuracy(case.model, test, case.collator))
        reft.detach()
    return found


def look(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Draw the grids of a case, look for its subspaces; return the figures."""
    output = Path(args.output)
    rows = make_pairs(case, case.minimal, "test", args.num_grid)
    report: dict[str, Any] = {"num_minimal_pairs": len(rows), "grids": {}, "subspaces": []}
    with vlreft.FeatureCache("1GB").on(case.model, required=False):
        for site, named in case.grids.items():
            grid = patch_grid(case.model, case.collator, rows, positions=list(named.values()), site=site)
            grid = replace(grid, positions=tuple(named))
            figure = grid.plot()
            figure.axes[0].set_title(f"where the colour is ({len(rows)} pairs)", fontsize=9)
            figure.savefig(output / f"grid_{name}_{site}.png", dpi=130)
            report["grids"][site] = as_table(grid)
        train, test = (
            make_pairs(case, case.different, split, count)
            for split, count in (("train", args.num_train), ("test", args.num_test))
        )
        for place in case.places:
            states = vlreft.Intervention(
                "interchange", site=place.site, layers=place.layer, positions=place.positions, init="reference"
            )
            reft = vlreft.attach(case.model, vlreft.ReftConfig(states))
            whole = interchange_accuracy(case.model, test, case.collator)
            reft.detach()
            for rank in args.ranks:
                found = measure(case, place, rank, train, test, args)
                report["subspaces"].append(
                    {"place": place.name, "rank": rank, "num_test": len(test), "whole states": whole, **found}
                )
    return report


def as_table(grid: PatchGrid) -> dict[str, list[float]]:
    """Return the accuracies by position, layer after layer."""
    return {name: row.tolist() for name, row in zip(grid.positions, grid.accuracy_PN, strict=True)}


def shown(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


CASES: dict[str, tuple[Callable[[str], Case], str]] = {"picture": (pictures, "model"), "text": (texts, "lm")}


def main() -> None:
    """Look at the cases that were asked for; write pictures and results.json, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "demo-llava"))
    parser.add_argument("--lm", default=str(ASSETS / "demo-lm"))
    parser.add_argument("--output", default="runs/find_subspace")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--num-train", type=int, default=400)
    parser.add_argument("--num-test", type=int, default=150)
    parser.add_argument("--num-grid", type=int, default=64)
    args = parser.parse_args()
    Path(args.output).mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in args.cases:
        make, model = CASES[name]
        results[name] = look(name, make(getattr(args, model)), args)
        (Path(args.output) / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for site, table in results[name]["grids"].items():
            print(f"\n{name}, site '{site}': accuracy of patching, layer after layer")
            for place, values in table.items():
                print(f"  {place:<28}" + "".join("      -" if value != value else f"{value:7.2f}" for value in values))
        print(f"\n{name}: the colour alone, interchange accuracy on held-out pairs, over seeds {args.seeds}")
        for one in results[name]["subspaces"]:
            print(
                f"  {one['place']}, rank {one['rank']}: whole states {one['whole states']:.3f}, "
                f"random {shown(one['random'])}, DAS {shown(one['das'])}"
            )
    print(f"wrote {args.output}/results.json and the grids")


if __name__ == "__main__":
    main()
