"""What searches, placings and comparisons are told alike: task, base, data, budget; and the workbench made of it."""

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from datasets import disable_progress_bars

import vlreft
from tasks.manifest import PACKAGES
from tasks.protocol import Settings, describe_base, load_base, load_train_and_dev
from tasks.run import ASSETS, DEMO_MODELS, assignment, is_small, sort_of
from tasks.search.budget import Budget, meter_of, parse_time
from tasks.search.trial import CACHES, Workbench
from tasks.splits import describe_part
from tasks.table import TASKS
from tasks.task import Task

Made = TypeVar("Made")
VERSIONS = ("vlreft", "torch", "transformers", "peft", "optuna")


def make_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """Make a command's parser, with what all of them take."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=text, formatter_class=raw)
    _add_arguments(parser)
    return parser


def carry_out(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, do: Callable[[argparse.Namespace], Made]
) -> Made:
    """Do what the arguments say; what is wrong with them ends the command with one sentence."""
    args = parser.parse_args(arguments)
    try:
        return do(args)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("task")
    add("--model", help="a folder or a name on the hub; a demo model by default")
    add("--data", help="the folder with the official files; the hub by default")
    add("--train-data", help="the folder to train from, where it is not that of --data")
    add("--output", help="the folder of all that is written")
    add("--budget", help="seconds, minutes or hours, as 90s, 30m, 1.5h: processor time on a CPU, the clock's on a GPU")
    add("--trials", type=int, help="a number of trials, instead of --budget")
    add("--flops", type=float, help="floating-point operations, instead of --budget")
    add("--epochs", type=float, default=5.0, help="of the final training, at most (5)")
    add("--seed", type=int, default=0, help="of the trials' trainings, and of the search")
    add("--batch-size", type=int, default=16)
    add("--eval-batch-size", type=int, default=100)
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="of transformers.TrainingArguments")
    add("--shots", type=int, help="train on so many examples of each class")
    add("--num-train", type=int, help="train on so many examples, drawn by --split-seed")
    add("--num-dev", type=int, help="select on so many examples")
    add("--split-seed", type=int, default=0)
    add("--drop-shared", action="store_true", help="leave examples that stand in dev as well out of train")
    add("--max-length", type=int, help="of prompt and answer together, in tokens")
    add("--max-new-tokens", type=int)
    add("--prompt", help="instead of the task's own, as '{question} Answer in one word.'")
    add("--dtype", choices=["float32", "bfloat16", "float16"])
    add("--device")
    add("--threads", type=int)
    add("--cache", default=CACHES, help="memory for features of pictures, and as much for prefixes (4GB)")


def budget_of(args: argparse.Namespace) -> Budget:
    """Return the budget. Raises ValueError unless there is exactly one."""
    given = [
        None if args.budget is None else parse_time(args.budget),
        None if args.trials is None else Budget(args.trials, "trials"),
        None if args.flops is None else Budget(args.flops, "operations"),
    ]
    budgets = [one for one in given if one is not None]
    if len(budgets) != 1:
        raise ValueError(f"{len(budgets)} budgets are given; give one of --budget, --trials and --flops")
    return budgets[0]


def task_and_source(name: str) -> tuple[Task, Task]:
    """Return a task and what is trained on for it. Raises ValueError for none, and for one without training data."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}.")
    task = TASKS[name]
    source = task if task.parts.train is not None else TASKS.get(task.parts.train_on or "")
    if source is None or source.parts.train is None:
        raise ValueError(f"the task {name!r} has nothing to train and select on: it has neither train nor dev.")
    return task, source


def settings_of(task: Task, args: argparse.Namespace) -> Settings:
    """Return a run's settings; what methods choose is in none of them."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = args.model or str(ASSETS / DEMO_MODELS[sort_of(task)])
    if args.threads or is_small(model):
        torch.set_num_threads(args.threads or 1)
    return Settings(
        task=task.name,
        model=model,
        data=args.data,
        train_data=args.train_data,
        training={**dict(map(assignment, args.set)), "per_device_train_batch_size": args.batch_size},
        generation={} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens},
        shots=args.shots,
        num_train=args.num_train,
        num_dev=args.num_dev,
        split_seed=args.split_seed,
        drop_shared=args.drop_shared,
        max_length=args.max_length,
        prompt=args.prompt,
        dtype=args.dtype or ("float32" if device == "cpu" else "bfloat16"),
        device=device,
        eval_batch_size=args.eval_batch_size,
    )


def make_bench(source: Task, settings: Settings, budget: Budget, cache: str = CACHES) -> Workbench:
    """Load base and data, once for all trials."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    train, dev = load_train_and_dev(source, settings)
    return Workbench(
        task=source,
        setup=load_base(source, settings, train),
        train=train,
        dev=dev,
        meter=meter_of(budget, settings.device),
        device=settings.device,
        eval_batch_size=settings.eval_batch_size,
        settings=dict(settings.training),
        features=vlreft.FeatureCache(cache),
        prefixes=vlreft.KeptPrefixes(cache, required=False),
    )


@dataclass(frozen=True)
class Prepared:
    """What a command works with. identity: what trials depend on beside their choices."""

    task: Task
    budget: Budget
    settings: Settings
    bench: Workbench
    versions: Mapping[str, str]
    identity: Mapping[str, Any]


def prepare(args: argparse.Namespace, *, num_test: int | None = None) -> Prepared:
    """Load all that the options name. Raises ValueError for what does not fit, before anything is loaded if it can."""
    task, source = task_and_source(args.task)
    budget, settings = budget_of(args), replace(settings_of(task, args), num_test=num_test)
    bench, known = make_bench(source, settings, budget, args.cache), versions()
    return Prepared(task, budget, settings, bench, known, identity_of(bench, settings, known))


def identity_of(bench: Workbench, settings: Settings, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return what trials depend on beside their choices: task, base, data, settings, versions."""
    base = describe_base(bench.setup.model)
    return {
        "task": bench.task.name,
        "model": settings.model,
        "base": {"class": base["class"], "num_weights": base["num_weights"], "sample": sample_of(bench.setup.model)},
        "data": {"train": describe_part(bench.train), "dev": describe_part(bench.dev)},
        "training": dict(settings.training),
        "settings": [settings.dtype, settings.device, settings.max_length, settings.prompt, dict(settings.generation)],
        "versions": {name: versions[name] for name in VERSIONS},
    }


def sample_of(model: torch.nn.Module) -> str:
    """Return a hash of some of each weight's numbers: what tells one base from another without reading all of it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(name.encode() + str(tuple(parameter.shape)).encode() + numbers)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of all that matters."""
    from importlib.metadata import version

    return {name: version(name) for name in (*PACKAGES, "peft", "optuna")}


def default_output(kind: str, task: Task) -> Path:
    """Return where a command writes if nobody says where."""
    return Path("runs") / kind / task.name
