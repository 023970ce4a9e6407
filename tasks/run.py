"""Train on a benchmark, select on dev, open its sealed test once, report.

    python -m tasks.run --list
    python -m tasks.run demo_code                                          # the demo model and data: a minute
    python -m tasks.run vqav2 --model llava-hf/llava-1.5-7b-hf --data FOLDER --lr 3e-4 1e-3 --seeds 0 1 2
    python -m tasks.run vqav2 --model llava-hf/llava-1.5-7b-hf --recipe mores
    python -m tasks.run pope --model llava-hf/llava-1.5-7b-hf --adapter runs/vqav2/trials/.../adapter
    python -m tasks.run demo_refuse --found runs/search/demo_refuse/best.json    # what `tasks.search` has found

The data are the official files in FOLDER, else the hub's. The same command goes on where an interrupted one stopped; a
finished run is only shown. Everything is in the output folder: `manifest.json`, `report.html`, every trial, and all
answers, also in the form of the benchmark's own results file.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vlreft
from tasks.protocol import Run, Settings
from tasks.statistics import mean_sd
from tasks.summary import write_summary
from tasks.table import TASKS
from tasks.task import Task
from vlreft.published import Recipe

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SMALL = 50_000_000  # bytes of weights, below which threads cost more than they bring
DEMO_MODELS = {"vision": "demo-llava", "text": "demo-lm", "dual": "demo-clip"}
DEFAULT_EDITS = {"vision": "text=prompt:l4", "text": "text=f4+l4", "dual": "vision=all"}
DEFAULTS = {"learning_rate": 1e-3, "num_train_epochs": 3, "per_device_train_batch_size": 16, "warmup_steps": 0.06}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run one task from the command line, and return the manifest's data."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.list:
        print(listing())
        return None
    try:
        return _run(args)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


def listing() -> str:
    """Return the table of tasks: what each is, its parts, and where its facts come from."""
    lines = []
    for task in TASKS.values():
        parts = task.parts
        train = f"train on {parts.train or f'the task {parts.train_on}'}"
        dev = f"select on {parts.dev or f'{parts.num_dev} of train ({parts.rule})'}"
        hub = [] if task.hub is None else [f"on the hub: {' '.join(filter(None, (task.hub.name, task.hub.config)))}"]
        lines += [f"{task.name}: {task.title}", f"    {train}; {dev}; test on {', '.join(parts.tests)}"]
        lines += [f"    {line}" for line in (*hub, *task.sources)]
    return "\n".join(lines)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    if args.task not in TASKS:
        raise ValueError(f"there is no task {args.task!r}; there are {', '.join(TASKS)}.")
    task = TASKS[args.task]
    source = task if task.parts.train is not None else TASKS[task.parts.train_on or task.name]
    folder = Path(args.output or Path("runs") / task.name)
    run = Run(task, source, _settings(task, args), folder)
    data = run.execute(args.reopen)
    write_summary(run, folder / "report.html")
    print(_shown(data, folder))
    return data


def _settings(task: Task, args: argparse.Namespace) -> Settings:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = args.model or str(ASSETS / DEMO_MODELS[sort_of(task)])
    if args.threads or is_small(model):
        torch.set_num_threads(args.threads or 1)  # a small model spends more time on waking threads than on arithmetic
    recipe = vlreft.recipe(args.recipe) if args.recipe else None
    found = {} if args.found is None else _found(args.found)["training"]
    training = {**(recipe.training if recipe else DEFAULTS), **found, **dict(map(assignment, args.set))}
    rate = training.pop("learning_rate")
    given = {
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
    }
    training |= {key: value for key, value in given.items() if value is not None}
    config = None if args.adapter or args.base_only else _config(task, args)
    return Settings(
        task=task.name,
        model=model,
        data=args.data,
        train_data=args.train_data,
        config=None if config is None else config.to_dict(),
        adapter=None if args.adapter is None else str(Path(args.adapter).resolve()),
        lrs=tuple(args.lr or [rate]),
        seeds=tuple(args.seeds or (recipe and recipe.seeds) or (0,)),
        training=training,
        generation={
            **(recipe.generation if recipe else {}),
            **({"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}),
            **dict(map(assignment, args.generate)),
        },
        shots=args.shots,
        num_train=args.num_train,
        num_dev=args.num_dev,
        num_test=args.num_test,
        split_seed=args.split_seed,
        drop_shared=args.drop_shared,
        tests=None if args.tests is None else tuple(args.tests),
        max_length=args.max_length or _length_of(recipe),
        overflow=args.overflow or (recipe.collator.get("overflow", "error") if recipe else "error"),
        prompt=args.prompt,
        dtype=args.dtype or ("float32" if device == "cpu" else recipe.dtype if recipe else "bfloat16"),
        device=device,
        eval_batch_size=args.eval_batch_size,
    )


def _found(name: str) -> dict[str, Any]:
    """What a search has found. Raises ValueError for a file that holds no interventions."""
    found = json.loads(Path(name).read_text())
    if not isinstance(found, dict) or not {"config", "training"} <= found.keys():
        raise ValueError(f"{name} holds no interventions that a search has found; give its best.json of a ReFT method.")
    return found


def _length_of(recipe: Recipe | None) -> int | None:
    return None if recipe is None else {**recipe.collator, **recipe.tokenizer}.get("max_length")


def _config(task: Task, args: argparse.Namespace) -> vlreft.ReftConfig:
    """What is trained: a recipe's or a file's config, else one method at the places that were named."""
    if args.recipe:
        return vlreft.recipe(args.recipe).config
    if args.found:
        return vlreft.ReftConfig.from_dict(_found(args.found)["config"])
    if args.config:
        file = Path(args.config)
        return vlreft.ReftConfig.from_dict(
            json.loads((file / "reft_config.json" if file.is_dir() else file).read_text())
        )
    layers = "all" if args.layers == "all" else [int(number) for number in args.layers.split(",")]
    edits = [edit.partition("=") for edit in args.edit or [DEFAULT_EDITS[sort_of(task)]]]
    rank = None if args.method in ("red", "vector") else args.rank
    return vlreft.ReftConfig(
        vlreft.Intervention(args.method, site=site, layers=layers, positions=positions, rank=rank, tied=args.tied)
        for site, _, positions in edits
    )


def sort_of(task: Task) -> str:
    """Return which of the demo models a task is for, and which of the default edits."""
    if task.kind in ("classes", "pairs"):
        return "dual"
    return "vision" if "image" in task.features else "text"


def is_small(model: str) -> bool:
    """Whether a model is a folder with few weights."""
    return Path(model).is_dir() and sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) < SMALL


def assignment(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE. Raises ValueError for anything else."""
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(f"{text!r} must be NAME=VALUE, as in `--set weight_decay=0.1` or `--generate num_beams=4`.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _shown(data: dict[str, Any], folder: Path) -> str:
    """The scores as a table, and where all else is."""
    num_test = data["settings"]["num_test"]
    lines = [] if num_test is None else [f"{num_test} examples of each test part only: no number to publish"]
    lines += [f"{'test':<14}{'metric':<12}{'base':>8}{'adapter':>17}"]
    for part, scores in data["test"]["scores"].items():
        base, values = scores["base"], [score["value"] for score in scores["adapters"]]
        shown = _mean(values) if values else ""
        lines.append(f"{part:<14}{base['name']:<12}{100 * base['value']:>8.2f}{shown:>17}")
        lines.append(f"  over {base['over']}")
    lines.append(f"the test was opened {len(data['test']['openings'])} time(s); all of it: {folder}/report.html")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    mean, spread = mean_sd(values)
    return f"{100 * mean:.2f}" if spread is None else f"{100 * mean:.2f} ± {100 * spread:.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", nargs="?", default="")
    add("--list", action="store_true", help="the tasks, their parts and sources")
    add("--model", help="a folder or a name on the hub; a demo model by default")
    add("--data", help="the folder with the official files; the hub by default")
    add("--train-data", help="the folder to train from, where it is not that of --data")
    add("--output", help="the run's folder, runs/TASK by default")
    add("--recipe", help="published settings, see `vlreft.recipes`")
    add("--config", help="a reft_config.json, or a folder with one")
    add("--found", metavar="BEST.json", help="what `python -m tasks.search` has found: interventions and training")
    add("--method", default="loreft")
    add("--edit", action="append", metavar="SITE=POSITIONS", help="where to edit; may be given several times")
    add("--layers", default="all", help="all, or numbers as 0,2,4")
    add("--rank", type=int, default=4)
    add("--tied", action="store_true")
    add("--adapter", help="test this adapter; nothing is trained")
    add("--base-only", action="store_true", help="test the base; nothing is trained")
    add("--lr", type=float, nargs="+", help="learning rates; the best on dev is taken")
    add("--seeds", type=int, nargs="+", help="0, or the recipe's")
    add("--epochs", type=float)
    add("--max-steps", type=int)
    add("--batch-size", type=int)
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="of transformers.TrainingArguments")
    add("--shots", type=int, help="train on so many examples of each class")
    add("--num-train", type=int, help="train on so many examples, drawn by --split-seed")
    add("--num-dev", type=int, help="select on so many examples")
    add("--num-test", type=int, help="answer so many examples of each test part only, to try things out")
    add("--split-seed", type=int, default=0)
    add("--drop-shared", action="store_true", help="leave examples that stand in dev as well out of train")
    add("--tests", nargs="+", help="of the task's test parts, all by default")
    add("--max-length", type=int, help="of prompt and answer together, in tokens")
    add("--overflow", choices=["error", "cut"], help="what becomes of longer answers; error by default")
    add("--max-new-tokens", type=int)
    add("--generate", action="append", default=[], metavar="NAME=VALUE", help="of model.generate, as num_beams=4")
    add("--prompt", help="instead of the task's own, as '{question} Answer in one word.'")
    add("--eval-batch-size", type=int, default=32)
    add("--dtype", choices=["float32", "bfloat16", "float16"])
    add("--device")
    add("--threads", type=int)
    add("--reopen", metavar="REASON", help="open the test of a finished run once more; it stays on record")
    return parser


if __name__ == "__main__":
    main()
