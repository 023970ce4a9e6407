"""What the steering scripts share: command line, rows, training with boxes, answers, figures over seeds, pictures.

A row is a question about a picture, with two answers: `plain`, what the base should say, and `answer`, what it should
say once steered. They differ in target rows alone. Steering is good if target rows change and the others do not.
"""

import argparse
import json
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from common import ASSETS, load_base, plt, recipe
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import vlreft
from vlreft.data.datasets import jsonl_rows, vqa_rows

sys.path.append(str(ASSETS.parent))  # the demo world is a script beside its data, not an installed package

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two exclusive


class Row(TypedDict):
    """A question; `told` is the question with an instruction to answer so, `picture` a name of its picture."""

    image: Any
    picture: str
    question: str
    told: str
    plain: str
    answer: str
    target: bool
    box: NotRequired[Box]


def command_line(
    description: str | None, output: str, *, lr: float, rank: int, num_train: int, num_test: int
) -> argparse.ArgumentParser:
    """Return a parser with the options of all steering scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "demo-llava"), help="a folder or a name on the hub")
    parser.add_argument("--data", help="a folder; without it, scenes of the demo world")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--output", default=output)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a training for each; the rows are the same")
    parser.add_argument("--rank", type=int, default=rank)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-train", type=int, default=num_train, help="rows; half of them targets, if there are")
    parser.add_argument("--num-test", type=int, default=num_test)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    return parser


# Rows ----------------------------------------------------------------------------------------------------------------


def read_rows(folder: str, split: str) -> Iterator[dict[str, Any]]:
    """Yield what steering reads of `<split>.jsonl` in a folder, else of its VQAv2 files; images are paths."""
    lines = Path(folder) / f"{split}.jsonl"
    for row in jsonl_rows(lines) if lines.is_file() else vqa_rows(Path(folder), split):
        yield {key: row[key] for key in ("image", "question", "answer", "target", "box") if key in row}


def half_and_half(rows: Iterator[Row], num_rows: int) -> list[Row]:
    """Return the first rows, half of them targets. Raises ValueError where either kind runs out."""
    wanted = {True: num_rows // 2, False: num_rows - num_rows // 2}
    taken: list[Row] = []
    for row in rows:
        if wanted[row["target"]]:
            wanted[row["target"]] -= 1
            taken.append(row)
        if not any(wanted.values()):
            return taken
    raise ValueError(
        f"of {num_rows} rows, {wanted[True]} targets and {wanted[False]} others are missing; ask for fewer"
    )


def check_apart(train: Sequence[Row], test: Sequence[Row]) -> None:
    """Raise ValueError if a picture is in both."""
    if shared := {row["picture"] for row in train} & {row["picture"] for row in test}:
        raise ValueError(f"{len(shared)} pictures are in train and in test, e.g. {min(shared)!r}; part them by picture")


# Training and answering ----------------------------------------------------------------------------------------------


class BoxCollator(vlreft.Collator):
    """A collator whose training batches also have `boxes`, (B, 4) pixels, if their rows have a box."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a training batch."""
        boxes = [example["box"] for example in examples if "box" in example]
        return {**super().__call__(examples), **({"boxes": torch.tensor(boxes)} if boxes else {})}


class SteeringTrainer(vlreft.ReftTrainer):
    """A trainer that gives each batch its boxes."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss with the batch's boxes in force."""
        boxes = inputs.get("boxes")
        inputs = {key: value for key, value in inputs.items() if key != "boxes"}
        with nullcontext() if boxes is None else self.reft.boxes(boxes.tolist()):
            return super().compute_loss(model, inputs, *args, **kwargs)


@dataclass(frozen=True)
class Base:
    """A frozen model with what reads and writes for it."""

    model: Any
    collator: BoxCollator
    max_new_tokens: int

    @classmethod
    def load(cls, args: argparse.Namespace) -> "Base":
        """Load the model and processor that the command line names."""
        model = load_base(AutoModelForImageTextToText, args.model)
        return cls(model, BoxCollator(AutoProcessor.from_pretrained(args.model)), args.max_new_tokens)

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], reft: vlreft.Reft | None = None, batch_size: int = 100) -> list[str]:
        """Answer each row's question greedily, with what is attached; `reft` is who is given the rows' boxes."""
        answers: list[str] = []
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            batch = {key: value.to(self.model.device) for key, value in self.collator.prompts(some).items()}
            boxes = [row["box"] for row in some if "box" in row]
            with reft.boxes(boxes) if reft is not None and boxes else nullcontext():
                ids_BS = self.model.generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False)
            answers += self.collator.decode(ids_BS, batch["input_ids"].shape[1])
        return answers

    def train(self, config: vlreft.ReftConfig, rows: Sequence[Row], args: argparse.Namespace, seed: int) -> vlreft.Reft:
        """Attach fresh interventions and train them on the rows' `answer`; the seed draws their start and the order."""
        set_seed(seed)
        reft = vlreft.attach(self.model, config)
        trainer = SteeringTrainer(
            model=self.model,
            args=recipe(argparse.Namespace(**{**vars(args), "seed": seed})),
            train_dataset=rows,
            data_collator=self.collator,
        )
        trainer.train()
        self.model.eval()
        return reft


# Figures -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Shares in [0, 1]. effect: targets answered as wanted. plain: targets answered as the base should.

    kept: other rows answered rightly; damage: how much less than the base; changed: other rows not answered as the base
    does, rightly or not.
    """

    effect: float
    plain: float
    kept: float
    damage: float
    changed: float


def figures(rows: Sequence[Row], answers: Sequence[str], base: Sequence[str]) -> Figures:
    """Compare answers with the rows' and with the base's own; letter case and outer blanks aside."""
    triples = list(zip(rows, map(_fold, answers), map(_fold, base), strict=True))
    targets = [(row, answer) for row, answer, _ in triples if row["target"]]
    others = [(row, answer, own) for row, answer, own in triples if not row["target"]]
    kept = _share(answer == _fold(row["plain"]) for row, answer, _ in others)
    return Figures(
        effect=_share(answer == _fold(row["answer"]) for row, answer in targets),
        plain=_share(answer == _fold(row["plain"]) for row, answer in targets),
        kept=kept,
        damage=_share(own == _fold(row["plain"]) for row, _, own in others) - kept,
        changed=_share(answer != own for _, answer, own in others),
    )


def _fold(text: str) -> str:
    return text.strip().lower()


def _share(hits: Iterator[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found) if found else 0.0


@dataclass(frozen=True)
class SeedResult:
    """One seed: figures at strength 1, over the dial, and what else a script measured."""

    seed: int
    reft: Figures
    dial: dict[float, Figures]
    train_seconds: float
    train_cpu_seconds: float
    more: dict[str, float]


def steer(
    base: Base,
    config: vlreft.ReftConfig,
    train: Sequence[Row],
    test: Sequence[Row],
    args: argparse.Namespace,
    more: Callable[[vlreft.Reft], dict[str, float]] = lambda _: {},
) -> None:
    """Measure base and prompting, train and measure each seed, turn the dial; write results.json and two pictures.

    The last seed's adapter is saved, and its answers are those in the picture.
    """
    check_apart(train, test)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    own = base.answer(test)
    told = base.answer([{**row, "question": row["told"]} for row in test])
    seeds: list[SeedResult] = []
    num_parameters = 0
    for seed in args.seeds:
        start, cpu_start = time.perf_counter(), time.process_time()
        reft = base.train(config, train, args, seed)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        answers = base.answer(test, reft)
        dial: dict[float, Figures] = {}
        for strength in STRENGTHS:
            with reft.scaled(strength):
                dial[strength] = figures(test, answers if strength == 1 else base.answer(test, reft), own)
        seeds.append(SeedResult(seed, figures(test, answers, own), dial, seconds, cpu_seconds, more(reft)))
        num_parameters = reft.num_parameters()
        if seed == args.seeds[-1]:
            reft.save_pretrained(output / "adapter")
            draw_rows(output / "examples.png", test, own, answers)
        reft.detach()
    draw_dial(output / "dial.png", seeds)
    results = summary(figures(test, own, own), figures(test, told, own), seeds) | {
        "model": args.model if Path(args.model).parent != ASSETS else Path(args.model).name,
        "trainable_parameters": num_parameters,
        "num_train": len(train),
        "num_targets": sum(row["target"] for row in test),
        "num_others": sum(not row["target"] for row in test),
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    print(f"wrote results.json, examples.png, dial.png and adapter/ in {output}")


def summary(base: Figures, prompting: Figures, seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """Return the figures as JSON data, with mean and standard deviation (n - 1; 0 for one seed) over seeds."""
    flat = [asdict(one.reft) | one.more for one in seeds]
    columns = {name: [row[name] for row in flat] for name in flat[0]}
    return {
        "base": asdict(base),
        "prompting": asdict(prompting),
        "mean": {name: statistics.mean(values) for name, values in columns.items()},
        "sd": {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in columns.items()},
        "seeds": [
            {
                "seed": one.seed,
                "reft": asdict(one.reft) | one.more,
                "dial": [{"strength": strength, **asdict(at)} for strength, at in one.dial.items()],
                "train_seconds": one.train_seconds,
                "train_cpu_seconds": one.train_cpu_seconds,
            }
            for one in seeds
        ],
    }


def print_table(results: Mapping[str, Any]) -> None:
    """Print effect and damage of base, prompting and ReFT."""
    names = ("effect", "kept", "damage", "changed")
    print(f"\n  {results['num_targets']} target and {results['num_others']} other questions; shares of them")
    print(f"  {'':<12}" + "".join(f"{name:>18}" for name in names))
    for who in ("base", "prompting"):
        print(f"  {who:<12}" + "".join(f"{results[who][name]:>18.3f}" for name in names))
    cells = [f"{results['mean'][name]:.3f} ± {results['sd'][name]:.3f}" for name in names]
    print(f"  {'ReFT':<12}" + "".join(f"{cell:>18}" for cell in cells))
    for name in sorted(results["mean"].keys() - results["base"].keys()):
        print(f"  {name}: {results['mean'][name]:.3f} ± {results['sd'][name]:.3f}")
    print(f"  {results['trainable_parameters']:,} trained numbers, {len(results['seeds'])} seeds\n")


# Pictures ------------------------------------------------------------------------------------------------------------


def draw_dial(path: Path, seeds: Sequence[SeedResult]) -> None:
    """Draw effect and damage against the strength, a thin line for each seed, the mean thick; and one by the other."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    strengths = list(seeds[0].dial)
    styles = {"effect": ("darkorange", "-"), "changed": ("steelblue", "-"), "damage": ("dimgray", "--")}
    for name, (color, dashes) in styles.items():
        lines = [[getattr(one.dial[strength], name) for strength in strengths] for one in seeds]
        for line in lines:
            left.plot(strengths, line, color=color, linewidth=0.6, alpha=0.6)
        means = [statistics.mean(values) for values in zip(*lines, strict=True)]
        left.plot(strengths, means, dashes, color=color, linewidth=2, marker="o", markersize=3, label=name)
    left.set(xlabel="strength", ylabel="share of questions", ylim=(-0.03, 1.03))
    left.legend(frameon=False)
    for one in seeds:
        points = [(at.damage, at.effect) for at in one.dial.values()]
        right.plot(*zip(*points, strict=True), color="darkorange", linewidth=1, marker="o", markersize=3)
    for strength, at in seeds[0].dial.items():
        right.annotate(f"{strength:g}", (at.damage, at.effect), fontsize=7, xytext=(3, 3), textcoords="offset points")
    right.set(xlabel="damage", ylabel="effect", ylim=(-0.03, 1.06))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def draw_rows(path: Path, rows: Sequence[Row], before: Sequence[str], after: Sequence[str], num_each: int = 3) -> None:
    """Draw some target rows, then some others: picture, box, question, the two answers; no picture twice."""
    chosen: list[int] = []
    for is_target in (True, False):
        seen: set[str] = set()
        for place, row in enumerate(rows):
            if row["target"] == is_target and row["picture"] not in seen and len(seen) < num_each:
                seen.add(row["picture"])
                chosen.append(place)
    figure, axes = plt.subplots(1, len(chosen), figsize=(2.6 * len(chosen), 3.6), squeeze=False)
    for axis, place in zip(axes[0], chosen, strict=True):
        row = rows[place]
        image = row["image"] if isinstance(row["image"], Image.Image) else Image.open(row["image"]).convert("RGB")
        axis.imshow(image, interpolation="nearest")
        axis.axis("off")
        if "box" in row:
            left, top, right, bottom = row["box"]
            size = right - left - 1, bottom - top - 1
            axis.add_patch(Rectangle((left, top), *size, fill=False, edgecolor="orange", linewidth=2))
        right_answer = _fold(after[place]) == _fold(row["answer"])
        below = (
            (-0.05, row["question"], {"fontsize": 8}),
            (-0.25, f"base: {before[place]}", {"fontsize": 9, "color": "dimgray"}),
            (-0.38, f"ReFT: {after[place]}", {"fontsize": 10, "color": "darkgreen" if right_answer else "darkred"}),
        )
        axis.set_title("target" if row["target"] else "other", fontsize=9)
        for y, text, style in below:
            folded = textwrap.fill(text, 28, max_lines=2)
            axis.text(0, y, folded, transform=axis.transAxes, va="top", **style)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
