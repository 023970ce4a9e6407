"""The demo tasks' figures: LoReFT placements next to tuned LoRA, each trained for the same CPU time on one thread.

    python -m tasks.demo                                  # all of it: an hour on a quiet core
    python -m tasks.demo --tasks code refuse --seeds 0 1 2

Every method, LoReFT included, tries the same three learning rates; the best on dev (seed 0) is then trained with each
seed and answers the test set once. LoReFT runs in `vlreft.ReftTrainer`, which reuses the prefix where no edit comes
before the question, LoRA in `transformers.Trainer`: time is what both have the same amount of. Writes `results.json`
(every run) and prints a Markdown table of means.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import vlreft
from vlreft import ReftTrainer
from vlreft.data.datasets import load_captions, load_jsonl, load_vqa

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DATA = ASSETS / "demo-vqa"
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
TEXT_LORA = rf".*layers\.\d+\.(self_attn|mlp)\.({LINEAR})"
VLM_LORA = rf".*language_model{TEXT_LORA}"
TOWER_LORA = rf"{VLM_LORA}|.*vision_tower.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@dataclass(frozen=True)
class Method:
    """One way to adapt the base: LoReFT with `edits` of (site, positions, rank), or LoRA on modules matching `lora`."""

    name: str
    edits: tuple[tuple[str, str, int], ...] = ()
    lora: str = ""

    def apply(self, model: PreTrainedModel) -> nn.Module:
        """Return the model to train."""
        if self.lora:
            return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=self.lora))
        edits = [vlreft.Intervention("loreft", site=s, positions=p, rank=r) for s, p, r in self.edits]
        vlreft.attach(model, vlreft.ReftConfig(edits))
        return model


@dataclass(frozen=True)
class Task:
    """A demo task: how to load a split, and the methods compared on it."""

    load: Callable[[str], Any]
    methods: tuple[Method, ...]
    is_text_only: bool = False


TASKS: dict[str, Task] = {
    "code": Task(
        lambda split: load_vqa(DATA / "code", split),
        (Method("LoReFT prompt:l4 r4", (("text", "prompt:l4", 4),)), Method("LoRA all linear r4", lora=VLM_LORA)),
    ),
    "refuse": Task(
        lambda split: load_vqa(DATA / "refuse", split),
        (
            Method("LoReFT image:all, prompt:l4 r4", (("text", "image:all", 4), ("text", "prompt:l4", 4))),
            Method("LoReFT prompt:l4 r8", (("text", "prompt:l4", 8),)),
            Method("LoReFT question r8", (("text", "question", 8),)),
            Method("LoRA all linear r4", lora=VLM_LORA),
        ),
    ),
    "bgr": Task(
        lambda split: load_vqa(DATA / "bgr", split),
        (
            Method("LoReFT vision r4", (("vision", "prompt", 4),)),
            Method("LoRA all linear r4", lora=VLM_LORA),
            Method("LoRA all linear and tower r4", lora=TOWER_LORA),
        ),
    ),
    "short": Task(
        lambda split: load_captions(DATA / "short", split),
        (
            Method("LoReFT question, response r4", (("text", "question", 4), ("text", "response", 4))),
            Method("LoReFT question r8", (("text", "question", 8),)),
            Method("LoRA all linear r4", lora=VLM_LORA),
        ),
    ),
    "lm_code": Task(
        lambda split: load_jsonl(DATA / "lm_code" / f"{split}.jsonl"),
        (Method("LoReFT prompt:l4 r4", (("text", "prompt:l4", 4),)), Method("LoRA all linear r4", lora=TEXT_LORA)),
        is_text_only=True,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run and its exact match on one split."""

    task: str
    method: str
    lr: float
    seed: int
    split: str
    accuracy: float
    trainable_parameters: int
    steps: int
    cpu_seconds: float


class CpuBudget(TrainerCallback):
    """Stops training after `seconds` of process time; `fraction_left` drives the linear decay of the learning rate."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = time.process_time()

    def spent(self) -> float:
        """CPU seconds since training began."""
        return time.process_time() - self.start

    def lr_factor(self, step: int) -> float:
        """Twenty steps of warm-up, then linear in the time that is left."""
        return min(1.0, (step + 1) / 20) * max(0.0, 1.0 - self.spent() / self.seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the time is up."""
        control.should_training_stop = self.spent() >= self.seconds


def load_base(task: Task) -> tuple[PreTrainedModel, vlreft.Collator]:
    """Load a fresh base and its collator."""
    if task.is_text_only:
        folder = ASSETS / "demo-lm"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval(), vlreft.Collator(AutoTokenizer.from_pretrained(folder))
    folder = ASSETS / "demo-llava"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), vlreft.Collator(AutoProcessor.from_pretrained(folder))


def train(model: nn.Module, collator: vlreft.Collator, data: Any, lr: float, seed: int, budget: CpuBudget) -> int:
    """Train for the budget's CPU time with AdamW, batch 16, no weight decay; return the steps made."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    arguments = TrainingArguments(
        output_dir="runs/demo", max_steps=10**6, per_device_train_batch_size=16, save_strategy="no", report_to="none",
        logging_strategy="no", disable_tqdm=True, seed=seed, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, budget.lr_factor)
    kind: type[Trainer] = ReftTrainer if isinstance(model, PreTrainedModel) else Trainer  # peft's model is a wrapper
    trainer = kind(
        model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[budget],
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    return trainer.state.global_step


@torch.no_grad()
def accuracy(model: Any, collator: vlreft.Collator, data: Any) -> float:
    """Return the share of greedy answers equal to the example's answer."""
    model.eval()
    hits = 0
    for start in range(0, len(data), 100):
        rows = [data[index] for index in range(start, min(start + 100, len(data)))]
        batch = collator.prompts(rows)
        ids = model.generate(**batch, max_new_tokens=32, do_sample=False)
        answers = collator.decode(ids, batch["input_ids"].shape[1])
        hits += sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True))
    return hits / len(data)


def run(name: str, method: Method, lr: float, seed: int, split: str, seconds: float) -> Run:
    """Adapt a fresh base on the training split and score one other split."""
    task = TASKS[name]
    set_seed(seed)
    base, collator = load_base(task)
    model = method.apply(base)
    budget = CpuBudget(seconds)
    steps = train(model, collator, task.load("train"), lr, seed, budget)
    spent = budget.spent()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = Run(
        name, method.name, lr, seed, split, accuracy(model, collator, task.load(split)), trainable, steps, spent
    )
    print(result, flush=True)
    return result


def compare(name: str, seeds: Sequence[int], seconds: float) -> list[Run]:
    """Tune each method's learning rate on dev, then test it with each seed."""
    runs: list[Run] = []
    for method in TASKS[name].methods:
        tried = [run(name, method, lr, seeds[0], "dev", seconds) for lr in LEARNING_RATES]
        best = max(tried, key=lambda one: one.accuracy).lr
        runs += tried + [run(name, method, best, seed, "test", seconds) for seed in seeds]
    return runs


def zero_shot(name: str) -> float:
    """Return the frozen base's exact match on test."""
    model, collator = load_base(TASKS[name])
    return accuracy(model, collator, TASKS[name].load("test"))


def table(runs: Sequence[Run], base: dict[str, float]) -> str:
    """Return a Markdown table: one row per task and method, mean and standard deviation over seeds on test."""
    lines = ["| task | method | trained numbers | lr | test | base |", "|---|---|---:|---:|---:|---:|"]
    for task, method in dict.fromkeys((one.task, one.method) for one in runs):
        tests = [one for one in runs if (one.task, one.method, one.split) == (task, method, "test")]
        scores = [one.accuracy for one in tests]
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        lines.append(
            f"| {task} | {method} | {tests[0].trainable_parameters:,} | {tests[0].lr:g} "
            f"| {statistics.mean(scores):.3f}{spread} | {base[task]:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cpu-seconds", type=float, default=20.0)
    parser.add_argument("--output", default="runs/demo")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    base: dict[str, float] = {}
    for name in args.tasks:
        base[name] = zero_shot(name)
        runs += compare(name, args.seeds, args.cpu_seconds)
        data = {"base": base, "cpu_seconds": args.cpu_seconds, "runs": [asdict(one) for one in runs]}
        (output / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    print("\n" + table(runs, base))


if __name__ == "__main__":
    main()
