"""Instruction following: Alpaca's or Ultrafeedback's rows for training, alpaca_eval's prompts for the test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.metrics.captions import text_scores
from tasks.metrics.score import Row
from tasks.task import TEXT_FEATURES, Hub, Parts, Task
from vlreft.data import files

# Alpaca's prompt without an input, which models without a chat template are asked through.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:\n"
)
INPUT = "\n\n### Input:\n"  # what stands between an instruction and its input
TRAINING_FILES = ("alpaca_data_cleaned.json", "alpaca_data.json", "train.json", "train.jsonl")


def part_files(folder: Path, part: str) -> list[Path]:
    """Return the part's file."""
    names = {"train": TRAINING_FILES, "test": ("alpaca_eval.json",)}
    if part not in names:
        raise ValueError(f"`part` (={part!r}) must be one of {list(names)}.")
    return [files.find_file(folder, *names[part])]


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON list, or of JSON lines.

    Training rows without an output, of which alpaca_data.json has some, are left out: nothing can be learnt from them.
    """
    (file,) = part_files(folder, part)
    rows = files.json_lines(file) if file.suffix == ".jsonl" else files.json_rows(file)
    for number, (where, found) in enumerate(rows):
        row = {"id": f"{part}-{number}", **_texts(found, where)}
        if part != "train" or row["answer"].strip():
            yield row


def from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's data set, or of one with Alpaca's columns."""
    name = row.get("prompt_id") or row.get("prompt") or row.get("instruction")
    return {"id": str(name), **_texts(row, f"the hub's row {name!r}")}


def _texts(row: Row, where: str) -> dict[str, Any]:
    """Question and answer of Ultrafeedback's columns, where there are any, else of Alpaca's."""
    if "chosen" in row or "messages" in row:
        question = files.text(row, "prompt", where)
        answer = _reply(row, "chosen" if "chosen" in row else "messages", where)
    else:
        question, answer = files.text(row, "instruction", where), files.value(row, "output", str, where)
        given = files.value(row, "input", str, where) if row.get("input") is not None else ""
        question += INPUT + given if given else ""
    return {"question": question, "answer": answer, "references": [answer]}


def _reply(row: Row, key: str, where: str) -> str:
    """The assistant's one message, which must follow the user's one."""
    messages = [files.mapping(message, where) for message in files.value(row, key, list, where)]
    roles = [message.get("role") for message in messages]
    if roles != ["user", "assistant"]:
        raise ValueError(f"{where}: {key!r} has messages of the roles {roles}; one question and one answer are read.")
    return files.value(messages[1], "content", str, where)


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make an entry of the outputs file that alpaca_eval's judge takes."""
    return {"instruction": row["question"], "output": answer, "generator": "vlreft"}


TASK = Task(
    name="instruct",
    title="instruction following: alpaca_eval's prompts, with a file for its judge; ROUGE-L in the meantime",
    kind="generate",
    parts=Parts(train="train", tests=("test",)),
    features=TEXT_FEATURES,
    read=read,
    files=part_files,
    metric=text_scores,
    line=line,
    hub=Hub("HuggingFaceH4/ultrafeedback_binarized", {"train": "train_sft"}, from_hub),
    prompt_format=ALPACA,
    generation={"max_length": 2048, "do_sample": False, "no_repeat_ngram_size": 5, "repetition_penalty": 1.1},
    sources=(
        "data: alpaca_data.json (tatsu-lab/stanford_alpaca) or alpaca_data_cleaned.json, or rows with Ultrafeedback's "
        "`prompt` and `chosen`; tested on alpaca_eval.json (tatsu-lab/alpaca_eval), which the hub has as a script only",
        "prompt: tatsu-lab/stanford_alpaca; its other opening sentence, for rows with an input, is not used here",
        "decoding: stanfordnlp/pyreft, examples/loreft/task_config.py (ultrafeedback): greedy, 2,048 tokens in all, no "
        "repeated 5-gram, repetition penalty 1.1",
        "metric: ROUGE-L against the reference outputs, for a first look. The published number is the win rate that "
        "alpaca_eval's judge gives the submission file (a JSON list of its lines); no figure here stands for it",
        "dev: 1,000 instructions cut from train by the run's seed",
    ),
)
