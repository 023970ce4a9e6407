"""Commonsense170K and its eight test sets, in the files of LLM-Adapters, as the ReFT paper trains and scores them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from tasks.metrics.answers import commonsense_accuracy
from tasks.metrics.score import Metric, Row, Score
from tasks.task import TEXT_FEATURES, Parts, Task
from vlreft.data import files

# What a model may choose from, per test set.
_TRUTHS = ("true", "false")
_SOLUTIONS = ("solution1", "solution2")
_ENDINGS = ("ending1", "ending2", "ending3", "ending4")
_OPTIONS = ("option1", "option2")
_ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")
CHOICES = {
    "boolq": _TRUTHS,
    "piqa": _SOLUTIONS,
    "social_i_qa": _ANSWERS,
    "hellaswag": _ENDINGS,
    "winogrande": _OPTIONS,
    "ARC-Easy": _ANSWERS,
    "ARC-Challenge": _ANSWERS,
    "openbookqa": _ANSWERS,
}
# The first set with each label.
SUBSET_OF = {label: name for name, labels in reversed(CHOICES.items()) for label in labels}
TRIGGER = "the correct answer is "  # what the model writes before its choice

# `label` is the gold choice, or the gold number, where `answer` is the whole text to learn. `subset` is the test set;
# the training files do not say what a row is from, there it is the first set with such a label.
ADAPTER_FEATURES = TEXT_FEATURES | {"subset": datasets.Value("string"), "label": datasets.Value("string")}


def adapter_files(folder: Path, part: str, train: str, tests: Sequence[str]) -> list[Path]:
    """Find the file of one part in a clone of LLM-Adapters, or in a folder arranged as pyreft's script does it.

    train: the training file's name, without its ending. Raises: ValueError for a part that is not one of these.
    """
    if part == "train":
        return [files.find_file(folder, f"ft-training_set/{train}.json", f"{train}/train.json", f"{train}.json")]
    if part in tests:
        return [files.find_file(folder, f"dataset/{part}/test.json", f"{part}/test.json")]
    raise ValueError(f"`part` (={part!r}) must be one of {['train', *tests]}.")


def by_label(metric: Metric) -> Metric:
    """Return the metric with each row's `label` as the answer that it compares with."""

    def score(answers: Sequence[Any], rows: Sequence[Row]) -> Score:
        return metric(answers, [{**row, "answer": row["label"]} for row in rows])

    return score


def part_files(folder: Path, part: str) -> list[Path]:
    """Return the part's file."""
    return adapter_files(folder, part, "commonsense_170k", tuple(CHOICES))


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the official JSON list; `output` is not read, it says the same as `answer`."""
    allowed = CHOICES.get(part, tuple(SUBSET_OF))
    for number, (where, row) in enumerate(files.json_rows(part_files(folder, part)[0])):
        label = files.text(row, "answer", where).strip()
        if label not in allowed:
            raise ValueError(f"{where}: 'answer' (={label!r}) must be one of {list(allowed)}; mend it.")
        yield {
            "id": f"{part}-{number}",
            "question": files.text(row, "instruction", where),
            "answer": TRIGGER + label,
            "references": [label],
            "subset": SUBSET_OF[label] if part == "train" else part,
            "label": label,
        }


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make an entry of the file that LLM-Adapters' evaluation writes."""
    return {"instruction": row["question"], "answer": row["label"], "output_pred": answer}


TASK = Task(
    name="commonsense",
    title="Commonsense170K: eight multiple-choice test sets after one training, mean accuracy",
    kind="generate",
    parts=Parts(train="train", tests=tuple(CHOICES)),
    features=ADAPTER_FEATURES,
    read=read,
    files=part_files,
    metric=by_label(commonsense_accuracy()),
    line=line,
    prompt_format="{question}\n",
    generation={"max_new_tokens": 32, "do_sample": False},
    sources=(
        "data: AGI-Edgerunners/LLM-Adapters, ft-training_set/commonsense_170k.json and dataset/*/test.json",
        "prompt and text to learn: stanfordnlp/pyreft, examples/loreft/task_config.py and dataset.py: the instruction "
        "and a line break, then 'the correct answer is ...'; models with a chat template are asked through it",
        "decoding: greedy, 32 new tokens (ReFT paper, appendix D.1; the same for LLM-Adapters' scores there)",
        "metric: stanfordnlp/pyreft, examples/loreft/compute_metrics.py: what follows 'the correct answer is' is the "
        "choice and nothing else; LLM-Adapters' commonsense_evaluate.py takes the first choice named anywhere",
        "dev: 1,000 questions cut from train by the run's seed; the paper tuned on GSM8K instead",
    ),
)
