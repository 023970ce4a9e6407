"""ScienceQA, the problems with a picture: school questions with two to five choices, answered by a letter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import ijson

from tasks.metrics.answers import scienceqa_accuracy
from tasks.metrics.score import Row
from tasks.reading import GENERATION, LETTER, LETTERS, choice, entry, lettered, texts
from tasks.task import VQA_FEATURES, Parts, Task
from vlreft.data import files
from vlreft.data.files import Pictures

FEATURES = VQA_FEATURES | {
    "context": datasets.Value("string"),  # a line of its own, or nothing
    "options": datasets.Value("string"),
    "choices": datasets.List(datasets.Value("string")),
    "has_image": datasets.Value("bool"),
}
PROMPT = "{context}{question}\n{options}\n" + LETTER


def find(folder: Path, part: str) -> list[Path]:  # noqa: ARG001 - one file has all parts
    """Return the file of all problems, and the file that says which part each is in."""
    return [files.find_file(folder, name, f"data/scienceqa/{name}") for name in ("problems.json", "pid_splits.json")]


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the part's problems that have a picture, in the order of the problems file."""
    problems, splits = find(folder, part)
    home = Pictures(problems.parent / "images" / part)
    wanted = split_ids(splits, part)
    seen: dict[str, None] = {}
    for where, name, row in files.json_pairs(problems):
        files.add(seen, name, None, where)
        if name in wanted and files.value(row, "image", (str, type(None)), where) is not None:
            yield problem(name, row, home, where)
    for name in wanted:
        if name not in seen:
            raise ValueError(f"{splits}, {part}: the problem {name!r} is not in {problems.name}; fetch both anew.")


def problem(name: str, row: Row, home: Pictures, where: str) -> dict[str, Any]:
    """Make the task's row of a problem."""
    image = home.named(where, f"{name}/{files.text(row, 'image', where)}")
    choices = texts(row, "choices", where)
    place = files.value(row, "answer", int, where)
    choice(choices, place, where)
    if len(choices) > len(LETTERS):
        raise ValueError(f"{where}: has {len(choices)} choices; the official script knows {len(LETTERS)} letters.")
    hint = files.value(row, "hint", str, where)
    made = entry(name, str(image), files.text(row, "question", where), LETTERS[place], [LETTERS[place]])
    context = f"Context: {hint}\n" if hint else ""
    return made | {"context": context, "options": lettered(choices), "choices": choices, "has_image": True}


def split_ids(file: Path, part: str) -> dict[str, None]:
    """Return the ids of the part's problems. Raises ValueError if one is no text or there twice, or if none is."""
    ids: dict[str, None] = {}
    try:
        with file.open("rb") as opened:
            for number, name in enumerate(ijson.items(opened, f"{part}.item")):
                where = f"{file}, {part} row {number}"
                if not isinstance(name, str):
                    raise ValueError(f"{where}: {name!r} has the wrong type {type(name).__name__}; ids are texts.")
                files.add(ids, name, None, where)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not JSON in UTF-8 ({' '.join(str(error).split())}); fetch it anew.") from error
    if not ids:
        raise ValueError(f"{file}: has no list of problems under {part!r}; its parts are 'train', 'val' and 'test'.")
    return ids


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make a line of the answers file that LLaVA's eval_science_qa.py reads; it knows picture problems by `<image>`."""
    return {"question_id": row["id"], "prompt": "<image>\n" + PROMPT.format(**row), "text": answer}


TASK = Task(
    name="scienceqa",
    title="ScienceQA (image): school questions with choices, accuracy of the letter",
    kind="generate",
    parts=Parts(train="train", dev="val", tests=("test",)),
    features=FEATURES,
    read=read,
    files=find,
    metric=scienceqa_accuracy,
    line=line,
    # Not on the hub: the copies there have no problem ids, without which rows cannot be told apart.
    prompt=PROMPT,
    generation=GENERATION,
    sources=(
        "data: lupantech/ScienceQA, data/scienceqa/problems.json and pid_splits.json, tools/download.sh (pictures)",
        "restriction: problems with a picture, what LLaVA-1.5 reports as SQA-I (6,218 / 2,097 / 2,017)",
        "prompt: letter instruction of LLaVA-1.5, llava/eval/model_vqa_science.py; context, question and choices as "
        "lmms-eval, tasks/scienceqa/utils.py; greedy, 16 new tokens",
        "metric: LLaVA, llava/eval/eval_science_qa.py",
        "dev: the official val",
    ),
)
