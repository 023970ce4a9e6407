"""Teach a frozen CLIP a new domain from a few pictures of each class, next to LoRA and a linear probe.

    python examples/finetune_clip.py             # the demo, 16 line drawings of each of 32 classes: minutes on one core
    python examples/finetune_clip.py --full      # 4, 8 and 16 shots, three seeds: half an hour (assets/README.md)
    python examples/finetune_clip.py --model hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K --data FOLDER --seconds 600

FOLDER holds train/, dev/ (or val/) and test/, and in each a folder of pictures for every class. The domain that must
not be forgotten is another such folder, `--original`. Every method trains for the same seconds of process time, and
takes the learning rate that was best on dev of the same three. LoRA is peft's, on all linear maps of both towers; the
probe is a linear layer on the picture's vector that starts as zero-shot and stops early.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import open_clip
import torch
from common import ASSETS
from torch import nn
from torch.nn import functional
from torchvision.datasets import ImageFolder
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import vlreft
from vlreft.data.contrast import ClassCollator, zero_shot

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEARNING_RATES = (3e-3, 1e-2, 3e-2)
LORA = r".*resblocks\.\d+\.(attn|mlp\.(c_fc|c_proj))|.*trunk\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
Rows = list[dict[str, Any]]


# 1. A frozen model, and pictures by class.


@dataclass
class Base:
    """The model under study by name: each run loads a fresh one."""

    name: str
    pretrained: str | None
    classes: Sequence[str] = ()
    templates: Sequence[str] = ()

    def load(self) -> tuple[nn.Module, ClassCollator]:
        """Return the model in evaluation mode, and the collator that goes with it."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        create: Any = open_clip.create_model_and_transforms
        model, _, preprocess = create(self.name, self.pretrained, device=device)
        tokenizer = open_clip.get_tokenizer(self.name)
        return model.eval().requires_grad_(False), ClassCollator(
            preprocess, tokenizer, classes=self.classes, templates=self.templates
        )


def load_rows(folder: Path) -> tuple[Rows, list[str]]:
    """Return the rows of a folder of class folders, and the classes; `_` in a folder's name is a blank."""
    found = ImageFolder(str(folder))
    return [{"image": path, "label": label} for path, label in found.samples], [
        name.replace("_", " ") for name in found.classes
    ]


def draw_shots(rows: Rows, shots: int, seed: int) -> Rows:
    """Return `shots` rows of each class, or all it has where they are fewer."""
    rng = random.Random(seed)
    by_class: dict[int, Rows] = {}
    for row in rows:
        by_class.setdefault(row["label"], []).append(row)
    return [row for some in by_class.values() for row in rng.sample(some, min(shots, len(some)))]


# 2. What is compared. A method takes a base, rows, a learning rate and a clock, trains, and returns how to classify.

Classify = Callable[[Rows], torch.Tensor]


class Clock(TrainerCallback):
    """Stops training after `seconds` of process time, and lets the learning rate fall linearly in the time left."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.process_time()

    def left(self) -> float:
        """The share of the time that is left."""
        return 1.0 - (time.process_time() - self.start) / self.seconds

    def lr_factor(self, step: int) -> float:
        """Ten steps of warm-up, then linear in the time left."""
        return min(1.0, (step + 1) / 10) * max(0.0, self.left())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the time is up."""
        control.should_training_stop = self.left() <= 0


def fit(trainer_class: type[Trainer], model: nn.Module, collator: ClassCollator, rows: Rows, lr: float, clock: Clock):
    """Train what is trainable in a model with transformers' Trainer; the loss is the collator's."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    arguments = TrainingArguments(
        output_dir="runs/finetune_clip", max_steps=10**6, per_device_train_batch_size=32, save_strategy="no",
        report_to="none", logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False, seed=torch.initial_seed() % 2**32,
    )  # fmt: skip
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=collator,
        compute_loss_func=collator.loss,
        callbacks=[clock],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, clock.lr_factor)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()


@dataclass
class Fitted:
    """What came of one training: how to classify, how many numbers were trained, and the interventions if any."""

    classify: Classify
    num_trained: int
    reft: vlreft.Reft | None = None


def loreft(edits: Sequence[str], rank: int) -> Callable[..., Fitted]:
    """One LoReFT for each layer of each edit SITE=POSITIONS."""
    config = vlreft.ReftConfig(
        vlreft.Intervention("loreft", site=site, layers="all", positions=positions, rank=rank)
        for site, positions in (edit.split("=", 1) for edit in edits)
    )

    def method(base: Base, rows: Rows, lr: float, clock: Clock) -> Fitted:
        model, collator = base.load()
        reft = vlreft.attach(model, config)
        fit(vlreft.ReftTrainer, model, collator, rows, lr, clock)
        return Fitted(lambda data: zero_shot(model, data, collator).predictions, reft.num_parameters(), reft)

    return method


def lora(base: Base, rows: Rows, lr: float, clock: Clock) -> Fitted:
    """peft's LoRA of rank 4 on the attention (which peft takes as a whole) and both layers of the MLP of all blocks."""
    from peft import LoraConfig, get_peft_model

    model, collator = base.load()
    model: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LORA))  # pyright: ignore
    fit(Trainer, model, collator, rows, lr, clock)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Fitted(lambda data: zero_shot(model, data, collator).predictions, num_trained)


def probe(dev: Rows) -> Callable[..., Fitted]:
    """A linear layer on the frozen picture vectors, of which zero-shot's class vectors are the start.

    It makes thousands of steps where the others make a hundred, and would overfit: it keeps the weights that were best
    on dev, and ends when a thousand steps have brought nothing.
    """

    def method(base: Base, rows: Rows, lr: float, clock: Clock) -> Fitted:
        model: Any
        model, collator = base.load()
        with torch.no_grad():
            scale = model.logit_scale.exp()
            texts = [part["text"].to(scale.device) for part in collator.prompts(64)]
            start = collator.class_vectors(torch.cat([model.encode_text(part, normalize=True) for part in texts]))

        @torch.no_grad()
        def vectors(data: Rows) -> torch.Tensor:
            parts = [collator.pictures(data[i : i + 64])["image"] for i in range(0, len(data), 64)]
            return torch.cat([model.encode_image(part.to(scale.device), normalize=True) for part in parts])

        layer = nn.Linear(start.shape[1], start.shape[0], device=start.device)
        nn.init.zeros_(layer.bias)
        layer.weight.data.copy_(start)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
        inputs, labels = vectors(rows), torch.tensor([row["label"] for row in rows], device=start.device)
        dev_inputs, dev_labels = vectors(dev), torch.tensor([row["label"] for row in dev], device=start.device)
        step, best_step, best_right, best = 0, 0, -1, layer.state_dict()
        while clock.left() > 0 and step - best_step <= 1000:
            if step % 10 == 0 and (right := (layer(dev_inputs).argmax(-1) == dev_labels).sum().item()) > best_right:
                best_step, best_right, best = step, right, {k: v.clone() for k, v in layer.state_dict().items()}
            optimizer.zero_grad()
            functional.cross_entropy(scale * layer(inputs), labels).backward()
            optimizer.step()
            step += 1
        layer.load_state_dict(best)
        num_trained = sum(p.numel() for p in layer.parameters())
        return Fitted(lambda data: layer(vectors(data)).argmax(-1).cpu(), num_trained)

    return method


# 3. The comparison.


@dataclass(frozen=True)
class Run:
    """One training run: accuracies in [0, 1]; `original` is None without an original domain."""

    method: str
    shots: int
    lr: float
    seed: int
    dev: float
    test: float
    original: float | None
    num_trained: int


@dataclass
class Study:
    """The data of one comparison, and its runs so far."""

    base: Base
    train: Rows
    dev: Rows
    test: Rows
    original: Rows
    seconds: float
    runs: list[Run] = field(default_factory=list)

    def run(self, name: str, method: Callable[..., Fitted], shots: int, lr: float, seed: int) -> tuple[Run, Fitted]:
        """Train once and score everything."""
        set_seed(seed)
        rows = draw_shots(self.train, shots, seed)
        fitted = method(self.base, rows, lr, Clock(self.seconds))
        dev, test = share_right(fitted.classify, self.dev), share_right(fitted.classify, self.test)
        original = share_right(fitted.classify, self.original) if self.original else None
        result = Run(name, shots, lr, seed, dev, test, original, fitted.num_trained)
        print(result, flush=True)
        return result, fitted

    def compare(self, name: str, method: Callable[..., Fitted], shots: int, seeds: Sequence[int]) -> Fitted:
        """Choose the learning rate on dev with the first seed, whose best is returned; then run the other seeds."""
        tried = [self.run(name, method, shots, lr, seeds[0]) for lr in LEARNING_RATES]
        best, fitted = max(tried, key=lambda pair: pair[0].dev)
        self.runs += [best, *(self.run(name, method, shots, best.lr, seed)[0] for seed in seeds[1:])]
        return fitted

    def scores(self, name: str, shots: int, what: str) -> list[float]:
        """The accuracies of the chosen learning rate, one for each seed."""
        return [getattr(run, what) for run in self.runs if (run.method, run.shots) == (name, shots)]


def share_right(classify: Classify, rows: Rows) -> float:
    """The accuracy."""
    labels = torch.tensor([row["label"] for row in rows])
    return round((classify(rows) == labels).float().mean().item(), 4)


def main() -> None:
    """Compare, print the table, draw the picture, and check the saved adapter in a fresh base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=f"local-dir:{ASSETS / 'demo-clip'}", help="as open_clip names it")
    parser.add_argument("--pretrained", help="open_clip's tag of the weights, for names without a schema")
    parser.add_argument("--data", type=Path, default=ASSETS / "demo-clip-data" / "lines")
    parser.add_argument("--original", type=Path, help="default: the demo's filled shapes, for the demo's data")
    parser.add_argument("--template", action="append", help="default: 'a {}' for the demo, else 'a photo of a {}'")
    parser.add_argument("--edit", action="append", metavar="SITE=POSITIONS", help="default: vision=prompt")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15.0, help="process time of every training")
    parser.add_argument("--full", action="store_true", help="4, 8 and 16 shots, three seeds, text edits as well")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_clip"))
    args = parser.parse_args()
    if find_spec("peft") is None:
        parser.error("LoRA, which LoReFT is compared with, is peft's: pip install -e '.[test]'")
    is_demo = args.data == ASSETS / "demo-clip-data" / "lines"
    original = args.original or (ASSETS / "demo-clip-data" / "filled" if is_demo else None)
    logging.set_verbosity_error()
    args.output.mkdir(parents=True, exist_ok=True)

    (train, classes), (test, _) = load_rows(args.data / "train"), load_rows(args.data / "test")
    base = Base(args.model, args.pretrained, classes, args.template or ["a {}" if is_demo else "a photo of a {}"])
    old = load_rows(original / "test")[0] if original else []
    dev = next((args.data / name for name in ("dev", "val") if (args.data / name).is_dir()), args.data / "dev")
    study = Study(base, train, load_rows(dev)[0], test, old, args.seconds)
    model, collator = base.load()
    if sum(p.numel() for p in model.parameters()) < 50_000_000:
        torch.set_num_threads(1)  # a model this small spends more time on waking threads than on arithmetic
    before = zero_shot(model, test, collator)
    zero = {"test": round(before.accuracy, 4), "original": None}
    if old:
        zero["original"] = round(zero_shot(model, old, collator).accuracy, 4)
    print(f"zero-shot: {zero}", flush=True)

    edits = args.edit or ["vision=prompt"]
    methods = {"LoReFT": loreft(edits, args.rank)}
    if args.full:
        methods["LoReFT, text too"] = loreft([*edits, "text=eos"], args.rank)
    methods |= {"LoRA": lora, "linear probe": probe(study.dev)}
    all_shots, seeds = ((4, 8, 16), (0, 1, 2)) if args.full else ((16,), (0,))
    fitted: dict[str, Fitted] = {}
    for shots in all_shots:
        for name, method in methods.items():
            fitted[name] = study.compare(name, method, shots, seeds)
            runs = [asdict(run) for run in study.runs]
            (args.output / "results.json").write_text(json.dumps({"zero_shot": zero, "runs": runs}, indent=1) + "\n")

    print("\n" + table(study, zero))
    reft = fitted["LoReFT"].reft
    assert reft is not None
    after = fitted["LoReFT"].classify(test)
    with reft.disabled():
        assert torch.equal(fitted["LoReFT"].classify(test), before.predictions), "the base has changed"
    reft.save_pretrained(args.output / "adapter")
    vlreft.load(model, args.output / "adapter")
    same = (zero_shot(model, test, collator).predictions == after).sum().item()
    print(f"\na fresh base with the saved adapter classifies {same} of {len(test)} pictures as before saving")
    draw(args.output / "finetune_clip.png", study, zero, classes, before.predictions.tolist(), after.tolist())
    print(f"wrote {args.output}/results.json, {args.output}/finetune_clip.png and {args.output}/adapter")


# 4. The report.


def mean_and_spread(scores: Sequence[Any]) -> str:
    """Mean and standard deviation over seeds."""
    if None in scores:
        return ""
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread}"


def table(study: Study, zero: dict[str, Any]) -> str:
    """A Markdown table, one row for each method and number of shots."""
    lines = ["| shots | method | trained numbers | lr | new domain | original |", "|---:|---|---:|---:|---:|---:|"]
    lines.append(f"| 0 | zero-shot | 0 | | {mean_and_spread([zero['test']])} | {mean_and_spread([zero['original']])} |")
    for shots, name in dict.fromkeys((run.shots, run.method) for run in study.runs):
        first = next(run for run in study.runs if (run.method, run.shots) == (name, shots))
        test, original = (mean_and_spread(study.scores(name, shots, what)) for what in ("test", "original"))
        lines.append(f"| {shots} | {name} | {first.num_trained:,} | {first.lr:g} | {test} | {original} |")
    return "\n".join(lines)


def draw(
    path: Path, study: Study, zero: dict[str, Any], classes: Sequence[str], before: list[int], after: list[int]
) -> None:
    """Draw pictures with what was said of them before and after, and accuracies by the number of shots."""
    figure = plt.figure(figsize=(12, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.9))
    rows = random.Random(0).sample(range(len(study.test)), 6)
    for place, index in enumerate(rows):
        row, axis = study.test[index], figure.add_subplot(grid[0, place])
        axis.imshow(plt.imread(row["image"]), interpolation="nearest")
        axis.axis("off")
        for height, who, said in ((1.14, "base", before[index]), (1.03, "LoReFT", after[index])):
            color = "darkgreen" if said == row["label"] else "darkred"
            text = f"{who}: {classes[said]}"
            axis.text(0, height, text, transform=axis.transAxes, fontsize=9, color=color)
    all_shots = sorted({run.shots for run in study.runs})
    panels = [("test", "new domain, test")] + ([("original", "original domain")] if study.original else [])
    for place, (what, title) in enumerate(panels):
        axis = figure.add_subplot(grid[1, 3 * place : 3 * place + 3])
        axis.axhline(zero[what], color="gray", linestyle=":", label="zero-shot")
        for shift, name in enumerate(dict.fromkeys(run.method for run in study.runs)):
            scores = [study.scores(name, shots, what) for shots in all_shots]
            spread = [statistics.stdev(some) if len(some) > 1 else 0.0 for some in scores]
            trained = next(run.num_trained for run in study.runs if run.method == name)
            x = [shots * 1.02**shift for shots in all_shots]
            y = [statistics.mean(some) for some in scores]
            axis.errorbar(x, y, spread, marker="o", capsize=3, label=f"{name}, {trained:,} numbers")
        axis.set(xscale="log", xlim=(all_shots[0] / 1.3, all_shots[-1] * 1.3), xlabel="shots per class", title=title)
        axis.set_xticks(all_shots, [str(shots) for shots in all_shots])
        axis.minorticks_off()
        axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.3)
        if place == 0:
            axis.set_ylabel("accuracy")
            axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
