"""Math10K and four arithmetic test sets, in the files of LLM-Adapters, as the ReFT paper trains and scores them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.commonsense import ADAPTER_FEATURES, adapter_files, by_label, line
from tasks.instruct import ALPACA
from tasks.metrics.answers import arithmetic_accuracy
from tasks.metrics.score import Row
from tasks.task import Parts, Task
from vlreft.data import files

TESTS = ("AQuA", "gsm8k", "mawps", "SVAMP")
LETTERS = ("A", "B", "C", "D", "E")  # AQuA's choices; the other sets ask for numbers


def part_files(folder: Path, part: str) -> list[Path]:
    """Return the part's file."""
    return adapter_files(folder, part, "math_10k", TESTS)


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the official JSON list.

    What is learnt is train's `output`, a worked solution. The test files have outputs of another model, not all of them
    right: there the answer is the gold one.
    """
    for number, (where, row) in enumerate(files.json_rows(part_files(folder, part)[0])):
        label = _label(row, part, where)
        subset = "AQuA" if label in LETTERS else "gsm8k"
        yield {
            "id": f"{part}-{number}",
            "question": files.text(row, "instruction", where),
            "answer": files.text(row, "output", where) if part == "train" else label,
            "references": [label],
            "subset": subset if part == "train" else part,
            "label": label,
        }


def _label(row: Row, part: str, where: str) -> str:
    """The gold letter or number; train mixes both."""
    label = str(files.value(row, "answer", (str, int, float), where)).strip()
    is_letter, is_number = label in LETTERS, _is_number(label)
    if not (is_letter if part == "AQuA" else is_number or (part == "train" and is_letter)):
        kind = {"AQuA": "a letter from A to E", "train": "a number or a letter from A to E"}.get(part, "a number")
        raise ValueError(f"{where}: 'answer' (={label!r}) must be {kind}; mend it.")
    return label


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


TASK = Task(
    name="arithmetic",
    title="Math10K: AQuA, GSM8K, MAWPS and SVAMP after one training, mean accuracy of the final answers",
    kind="generate",
    parts=Parts(train="train", tests=TESTS, num_dev=300, rule="last"),
    features=ADAPTER_FEATURES,
    read=read,
    files=part_files,
    metric=by_label(arithmetic_accuracy),
    line=line,
    prompt_format=ALPACA,
    generation={"max_new_tokens": 512, "do_sample": False},
    sources=(
        "data: AGI-Edgerunners/LLM-Adapters, ft-training_set/math_10k.json and dataset/*/test.json; AddSub, MultiArith "
        "and SingleEq are left out, as their questions are in MAWPS's training data (ReFT paper, section 4.3)",
        "prompt and text to learn: stanfordnlp/pyreft, examples/loreft/task_config.py and templates.py: Alpaca's "
        "prompt, then `output`; models with a chat template are asked through it",
        "decoding: greedy, 512 new tokens; the paper's numbers were sampled with 4 beams, temperature 0.3, top-p 0.75 "
        "and top-k 40 (pyreft's task_config.py), which `--recipe` may set",
        "metric: stanfordnlp/pyreft, examples/loreft/compute_metrics.py: the last number, within 0.001; of AQuA the "
        "first letter from A to E",
        "dev: the last 300 training rows; the paper tuned on the last 300 of GSM8K's own training set",
    ),
)
