"""What the finetuning scripts share: command line, recipe, and the report at the end (table, results.json, picture)."""

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import TrainingArguments

import vlreft

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def command_line(
    description: str | None, model: str, data: str, output: str, *, lr: float, epochs: float
) -> argparse.ArgumentParser:
    """Return a parser with the options of all scripts; names of models and data are below `assets/` by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / model), help="a folder or a name on the hub")
    parser.add_argument("--data", default=str(ASSETS / data))
    parser.add_argument("--output", default=output)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--epochs", type=float, default=epochs)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def load_base(auto_class: Any, name: str) -> Any:
    """Load a model in evaluation mode: bfloat16 on GPUs, float32 on the CPU."""
    if torch.cuda.is_available():
        return auto_class.from_pretrained(name, dtype=torch.bfloat16, device_map="auto").eval()
    model = auto_class.from_pretrained(name, dtype=torch.float32).eval()
    if model.num_parameters() < 50_000_000:
        torch.set_num_threads(1)  # a model this small spends more time on waking threads than on arithmetic
    return model


def recipe(args: argparse.Namespace) -> TrainingArguments:
    """Return the training arguments: AdamW, linear decay after a short warm-up, no weight decay."""
    return TrainingArguments(
        output_dir=str(Path(args.output) / "checkpoints"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=100,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        warmup_steps=0.05,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
    )


def train_and_report(trainer: vlreft.ReftTrainer, test: Any, args: argparse.Namespace, auto_class: Any) -> None:
    """Answer the test set with the frozen base, train, answer again; save, load into a fresh base, report."""
    output, reft, collator = Path(args.output), trainer.reft, trainer.data_collator
    assert isinstance(collator, vlreft.Collator)
    with reft.disabled():
        before = trainer.predict_answers(test)
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    after = trainer.predict_answers(test)

    reft.save_pretrained(output / "adapter")
    fresh = load_base(auto_class, args.model)
    vlreft.load(fresh, output / "adapter")
    batch = {key: tensor.to(fresh.device) for key, tensor in collator.prompts([test[i] for i in range(8)]).items()}
    again = collator.decode(fresh.generate(**batch, **trainer.generation), batch["input_ids"].shape[1])
    print(f"a fresh base with the saved adapter gives {sum(map(str.__eq__, again, after))} of 8 answers again")

    draw_examples(output / "examples.png", reft, collator, [test[i] for i in range(6)], before[:6], after[:6])
    Results(
        base=exact_match(before, test)["accuracy"],
        reft=exact_match(after, test)["accuracy"],
        trainable_parameters=reft.num_parameters(),
        adapter_bytes=(output / "adapter" / "reft_model.safetensors").stat().st_size,
        train_seconds=seconds,
        train_cpu_seconds=cpu_seconds,
        seed=args.seed,
        num_test=len(test),
    ).write(output)
    print(f"wrote {output}/results.json, {output}/examples.png and {output}/adapter")


@dataclass(frozen=True)
class Results:
    """The figures of one run. `base` and `reft` are exact-match accuracies in [0, 1]; seconds are wall-clock."""

    base: float
    reft: float
    trainable_parameters: int
    adapter_bytes: int
    train_seconds: float
    train_cpu_seconds: float
    seed: int
    num_test: int

    def write(self, output: Path) -> None:
        """Print the table and write `results.json`."""
        (output / "results.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        rows = [
            ("exact match before", f"{self.base:.3f}"),
            ("exact match after", f"{self.reft:.3f}"),
            ("trainable parameters", f"{self.trainable_parameters:,}"),
            ("adapter size", f"{self.adapter_bytes / 1000:.1f} kB"),
            ("training", f"{self.train_seconds:.0f} s ({self.train_cpu_seconds:.0f} CPU s)"),
            ("test examples", f"{self.num_test:,}"),
        ]
        print("\n" + "\n".join(f"  {name:<22}{value:>18}" for name, value in rows) + "\n")


def exact_match(answers: Sequence[str], examples: Any) -> dict[str, float]:
    """Return the share of answers equal to the example's, letter case and outer blanks aside."""
    hits = [a.strip().lower() == e["answer"].strip().lower() for a, e in zip(answers, examples, strict=True)]
    return {"accuracy": sum(hits) / len(hits)}


def draw_examples(
    path: Path,
    reft: vlreft.Reft,
    collator: vlreft.Collator,
    examples: Sequence[Any],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    """Draw each example: its image if it has one, the question with edited tokens marked, the answers."""
    figure, axes = plt.subplots(1, len(examples), figsize=(3.2 * len(examples), 4.2), squeeze=False)
    for axis, example, old, new in zip(axes[0], examples, before, after, strict=True):
        axis.axis("off")
        axis.set(xlim=(0, 1), ylim=(-0.75, 1))
        if example.get("image") is not None:
            axis.imshow(example["image"], extent=(0, 1, 0, 1), interpolation="nearest")
        batch = collator.prompts([example])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        masks = [edited for edited in reft.edited(ids, mask) if edited is not None]
        edited = torch.stack(masks).any(0) if masks else torch.zeros_like(ids, dtype=torch.bool)
        bottom = _draw_tokens(axis, _words(collator, ids[0], edited[0]))
        right = new.strip().lower() == example["answer"].strip().lower()
        axis.text(0, bottom - 0.14, f"base: {_fold(old)}", fontsize=9, color="dimgray", va="top")
        color = "darkgreen" if right else "darkred"
        axis.text(0, bottom - 0.3, f"ReFT: {_fold(new)}", fontsize=10, weight="bold", color=color, va="top")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _words(collator: vlreft.Collator, ids: torch.Tensor, edited: torch.Tensor) -> list[tuple[str, bool]]:
    """Return the prompt's tokens as text, whether each is edited, runs of the image token folded into one word."""
    words: list[tuple[str, bool]] = []
    for token, is_edited in zip(collator.tokenizer.convert_ids_to_tokens(ids.tolist()), edited.tolist(), strict=True):
        word = "[image]" if token == collator.image_token else token.replace("\u0120", "").replace("\u2581", "")
        if not words or words[-1] != (word, is_edited) or word != "[image]":
            words.append((word, is_edited))
    return words


def _fold(text: str) -> str:
    return textwrap.fill(text, 30, max_lines=2)


def _draw_tokens(axis: Any, words: list[tuple[str, bool]]) -> float:
    """Draw the words from the image downwards, edited ones on orange; return where they end."""
    x, y = 0.0, -0.1
    for word, is_edited in words:
        width = 0.035 * len(word) + 0.05
        if x + width > 1.05:
            x, y = 0.0, y - 0.09
        box = {"boxstyle": "round,pad=0.15", "fc": "orange" if is_edited else "none", "ec": "none"}
        axis.text(x + 0.02, y, word, fontsize=7, family="monospace", bbox=box)
        x += width
    return y
