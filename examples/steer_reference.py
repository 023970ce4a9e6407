"""Steer by reference pictures, without training: what is said of other pictures moves toward what the references show.

    python examples/steer_reference.py                    # the demo: two to five minutes on one core
    python examples/steer_reference.py --seeds 0 --lengths 8 12
    python examples/steer_reference.py --model llava-hf/llava-1.5-7b-hf --captions FOLDER --data FOLDER \
        --dev-split train --test-split val --layers 8 9 10 11 --lengths 2 4 8 16

The references are pictures whose caption names the target, `red`. The direction is the mean of their image tokens in
the language model, minus that of the same pictures with their colour channels swapped, or that of pictures without the
target. It is added to the image tokens of other pictures, at several lengths: the dial. FOLDERs are in the layouts of
COCO's captions and of VQAv2. A seed draws the references.

The dial is set on dev: the longest direction that does at most `--damage`. Four figures on test:
effect: how many colour questions, of which the target is not the answer, are answered with it. damage: how many more
questions without colour are answered wrongly than by the base. said: how many of the captions' colours are the target.
altered: how many captions differ from the base's in more than their colours.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import steering
from common import ASSETS, plt
from PIL import Image
from steering import Base, Row

import vlreft
from vlreft.causes.directions import steer
from vlreft.data.datasets import caption_rows, vqa_rows

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white", "black", "brown", "pink", "gray")
SWAPS = ((1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1))  # of red, green and blue: all that move the red channel
# What a user would try instead. The demo model knows no instruction but `say W please`; real ones do better.
TOLD = ("everything is {target} . {question}", "say {target} please . {question}", "{question} say {target} please")
Captioned = tuple[str, str]  # a picture's file and caption


@dataclass(frozen=True)
class Figures:
    """Shares in [0, 1]; the head of this file says of what."""

    effect: float
    damage: float
    said: float
    altered: float


NAMES = tuple(Figures.__dataclass_fields__)


def main() -> None:
    """Find directions, turn the dial, measure; write the table, results.json and two pictures."""
    args = command_line().parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    base = Base.load(args)
    dev, test = (Asked.of(base, args, split) for split in (args.dev_split, args.test_split))
    captioned = [(row["image"], row["answer"]) for row in caption_rows(Path(args.captions), args.caption_split)]

    told = min(TOLD, key=lambda text: dev.figures(base, args.target, told=text).damage)
    results: dict[str, Any] = {
        "base": asdict(test.figures(base, args.target)),
        "prompting": {"told": told, **asdict(test.figures(base, args.target, told=told))},
        "num_test": {
            "targets": sum(row["target"] for row in test.questions),
            "others": sum(not row["target"] for row in test.questions),
            "captions": len(test.captions),
        },
    }
    for name, choose in REFERENCES.items():
        seeds = []
        for seed in args.seeds:
            reft = find(base, *choose(captioned, args.target, random.Random(seed)), args)
            dials = {length: strength(reft, length) for length in args.lengths}
            on_dev = {at: dev.figures(base, args.target, reft.scaled(dial)) for at, dial in dials.items()}
            on_test = {at: test.figures(base, args.target, reft.scaled(dial)) for at, dial in dials.items()}
            gentle = [length for length in dials if max(on_dev[length].damage, on_dev[length].altered) <= args.damage]
            chosen = max(gentle, default=min(dials))
            seeds.append(
                {
                    "seed": seed,
                    "chosen_on_dev": {"length": chosen, **asdict(on_test[chosen])},
                    "dial": [{"length": at, "strength": dials[at], **asdict(on_test[at])} for at in dials],
                }
            )
            if seed == args.seeds[-1]:
                reft.save_pretrained(output / name.replace(" ", "_"))
                with reft.scaled(dials[chosen]):
                    rows = [*test.questions, *test.captions[:3]]
                    shown = rows, test.own_answers + test.own_captions[:3], base.answer(rows)
                    steering.draw_rows(output / f"{name.replace(' ', '_')}.png", *shown)
            reft.detach()
        results[name] = {"chosen_on_dev": mean_and_sd([one["chosen_on_dev"] for one in seeds]), "seeds": seeds}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    draw_dial(output / "dial.png", results, args.target)
    print(f"wrote results.json, dial.png, a picture and an adapter for each kind of reference in {output}")


def command_line() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "demo-llava"), help="a folder or a name on the hub")
    parser.add_argument("--captions", default=str(ASSETS / "demo-vqa/short"), help="where the references come from")
    parser.add_argument("--caption-split", default="train")
    parser.add_argument("--data", default=str(ASSETS / "demo-vqa/base"), help="the questions that are asked")
    parser.add_argument("--dev-split", default="dev")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--describe", default="describe the image", help="the prompt for captions")
    parser.add_argument("--target", default="red", choices=COLORS)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lengths", type=float, nargs="+", default=[4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0])
    parser.add_argument("--damage", type=float, default=0.1, help="most damage, and captions altered, allowed on dev")
    parser.add_argument("--num", type=int, default=80, help="at most so many of each kind of question")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--output", default="runs/steer_reference")
    return parser


# References -----------------------------------------------------------------------------------------------------------


def swapped(file: str) -> list[Image.Image]:
    """Return the picture's copies with other colours: the same in all else."""
    with Image.open(file) as picture:
        red_green_blue = picture.convert("RGB").split()
    return [Image.merge("RGB", [red_green_blue[i] for i in swap]) for swap in SWAPS]


def one_picture(rows: Sequence[Captioned], target: str, rng: random.Random) -> tuple[list[Any], list[Any]]:
    """Choose a picture with no other colour, against its copies."""
    file = rng.choice([file for file, caption in rows if set(colors_in(caption)) == {target}])
    return [file] * len(SWAPS), swapped(file)


def some_pictures(rows: Sequence[Captioned], target: str, rng: random.Random) -> tuple[list[Any], list[Any]]:
    """Choose sixteen pictures with the target, against their copies."""
    files = rng.sample([file for file, caption in rows if target in colors_in(caption)], 16)
    return [file for file in files for _ in SWAPS], [copy for file in files for copy in swapped(file)]


def two_sets(rows: Sequence[Captioned], target: str, rng: random.Random) -> tuple[list[Any], list[Any]]:
    """Choose sixteen pictures with the target, against sixty-four without."""
    without = [file for file, caption in rows if target not in colors_in(caption)]
    return rng.sample([file for file, caption in rows if target in colors_in(caption)], 16), rng.sample(without, 64)


REFERENCES: dict[str, Callable[[Sequence[Captioned], str, random.Random], tuple[list[Any], list[Any]]]] = {
    "one picture": one_picture,
    "16 pictures": some_pictures,
    "16 with, 64 without": two_sets,
}


def find(base: Base, positive: list[Any], negative: list[Any], args: argparse.Namespace) -> vlreft.Reft:
    """Attach the direction at the image tokens; they are the same before any question, so the prompt is any."""
    config = vlreft.Intervention("vector", site="text", layers=args.layers, positions="image")
    with_, without = ([{"image": one, "question": args.describe} for one in some] for some in (positive, negative))
    return steer(base.model, config, base.collator, positive=with_, negative=without, batch_size=16)


def strength(reft: vlreft.Reft, length: float) -> float:
    """Return what gives the vectors a length, in units of the states, on average over the layers."""
    return length / statistics.mean(float(vector.detach().norm()) for vector in reft.parameters())


# Asking ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A split's questions, those about colours being the targets, and captions; with the base's own answers."""

    questions: list[Row]
    captions: list[Row]
    own_answers: list[str]
    own_captions: list[str]

    @classmethod
    def of(cls, base: Base, args: argparse.Namespace, split: str) -> "Asked":
        """Choose the first of each kind; captions of pictures in which the base sees no target."""
        kinds: dict[bool, list[Row]] = {True: [], False: []}
        pictures: dict[str, Row] = {}
        for given in vqa_rows(Path(args.data), split):
            file, question, answer = str(given["image"]), given["question"], given["answer"]
            is_target = answer in COLORS
            wanted = args.target if is_target else answer
            row = Row(
                image=file, picture=file, question=question, told="", plain=answer, answer=wanted, target=is_target
            )
            if (is_target and answer != args.target) or not colors_in(f"{question} {answer}"):
                kinds[is_target].append(row)
            pictures.setdefault(file, {**row, "question": args.describe, "target": False})
            if min(map(len, kinds.values())) >= args.num and len(pictures) >= 2 * args.num:
                break
        questions = kinds[True][: args.num] + kinds[False][: args.num]
        described = list(pictures.values())[: 2 * args.num]
        captions = [
            (row, said)
            for row, said in zip(described, base.answer(described), strict=True)
            if args.target not in colors_in(said)
        ][: args.num]
        own = base.answer(questions)
        return cls(questions, [row for row, _ in captions], own, [said for _, said in captions])

    def figures(
        self,
        base: Base,
        target: str,
        acting: AbstractContextManager[None] | None = None,
        *,
        told: str = "{question}",
    ) -> Figures:
        """Ask everything, while something acts or with an instruction."""
        questions, captions = (
            [Row(**{**row, "question": told.format(question=row["question"], target=target)}) for row in rows]
            for rows in (self.questions, self.captions)
        )
        with acting or nullcontext():
            answers, said = base.answer(questions), base.answer(captions)
        asked = steering.figures(self.questions, answers, self.own_answers)
        changed = [without_colors(a) != without_colors(b) for a, b in zip(said, self.own_captions, strict=True)]
        named = [word == target for text in said for word in colors_in(text)]
        return Figures(effect=asked.effect, damage=asked.damage, said=share(named), altered=share(changed))


def colors_in(text: str) -> list[str]:
    """Return the colour words of a text."""
    return [word for word in text.lower().replace(",", " ").replace(".", " ").split() if word in COLORS]


def without_colors(text: str) -> list[str]:
    """Return the words of a text, each colour replaced by one and the same."""
    return ["color" if word in COLORS else word for word in text.lower().split()]


def share(hits: Iterable[bool]) -> float:
    """Return the share of hits, 0 of nothing."""
    return statistics.mean([float(hit) for hit in hits] or [0.0])


# Report ---------------------------------------------------------------------------------------------------------------


def mean_and_sd(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation (n - 1; 0 for one seed)."""
    columns = {name: [row[name] for row in rows] for name in ("length", *NAMES)}
    return {
        "mean": {name: statistics.mean(values) for name, values in columns.items()},
        "sd": {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in columns.items()},
    }


def print_table(results: dict[str, Any]) -> None:
    """Print the figures at the strength that was chosen on dev."""
    print(f"\n  {results['num_test']}")
    print(f"  {'':<22}" + "".join(f"{name:>18}" for name in ("length", *NAMES)))
    for name in ("base", "prompting"):
        print(f"  {name:<22}{'':>18}" + "".join(f"{results[name][key]:>18.3f}" for key in NAMES))
    for name in REFERENCES:
        mean, sd = (results[name]["chosen_on_dev"][key] for key in ("mean", "sd"))
        print(f"  {name:<22}" + "".join(f"{f'{mean[key]:.3f} ± {sd[key]:.3f}':>18}" for key in ("length", *NAMES)))
    print()


def draw_dial(path: Path, results: dict[str, Any], target: str) -> None:
    """Draw effect against damage along the dial, of answers and of captions: a thin line a seed, the mean thick."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, (damage, effect) in zip(axes, (("damage", "effect"), ("altered", "said")), strict=True):
        for name, color in zip(REFERENCES, ("steelblue", "darkorange", "seagreen"), strict=True):
            dials = [one["dial"] for one in results[name]["seeds"]]
            lines = [([at[damage] for at in dial], [at[effect] for at in dial]) for dial in dials]
            for x, y in lines:
                axis.plot(x, y, color=color, linewidth=0.6, alpha=0.6)
            x, y = ([statistics.mean(at) for at in zip(*side, strict=True)] for side in zip(*lines, strict=True))
            axis.plot(x, y, color=color, linewidth=2, marker="o", markersize=3, label=name)
            for at, place in zip(dials[0], zip(x, y, strict=True), strict=True):
                axis.annotate(f"{at['length']:g}", place, fontsize=7, xytext=(3, -8), textcoords="offset points")
        for name, marker in (("base", "s"), ("prompting", "^")):
            axis.plot(results[name][damage], results[name][effect], marker, color="black", label=name)
        axis.set(xlabel=damage, ylabel=f"{effect}: '{target}'", xlim=(-0.03, 1.03), ylim=(-0.03, 1.06))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("questions")
    axes[1].set_title("captions")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
