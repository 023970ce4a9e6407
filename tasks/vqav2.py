"""VQAv2: open questions about COCO's pictures, with ten annotators' answers to each; and any folder in its format."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.metrics.score import Row
from tasks.metrics.vqa import vqa_accuracy
from tasks.reading import GENERATION, SHORT, SHORT_SOURCE, commonest, entry
from tasks.task import VQA_FEATURES, Hub, Parts, Task
from vlreft.data.datasets import vqa_files, vqa_rows


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the official questions and annotations files."""
    notes = vqa_files(folder, part)[1]
    for row in vqa_rows(folder, part):
        name, answers = row["question_id"], row["answers"]
        # The commonest answer may be empty: some annotators' are.
        answer = row["answer"] if row["answer"].strip() else commonest(answers, f"{notes}, question {name}")
        yield entry(name, row["image"], row["question"], answer, answers)


def from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's data set."""
    answers = [answer["answer"] for answer in row["answers"]]
    return entry(row["question_id"], row["image"], row["question"], row["multiple_choice_answer"], answers)


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make an entry of the official results file; a folder of one's own may have texts as ids."""
    return {"question_id": int(row["id"]) if row["id"].isdecimal() else row["id"], "answer": answer}


TASK = Task(
    name="vqav2",
    title="VQAv2: open questions about COCO pictures, soft accuracy over ten answers",
    kind="generate",
    # The official test sets have no public answers; what papers tune on "test-dev" is `val` here.
    parts=Parts(train="train", tests=("val",), num_dev=5000),
    features=VQA_FEATURES,
    read=read,
    files=vqa_files,
    metric=vqa_accuracy("vqav2"),
    line=line,
    hub=Hub("lmms-lab-encoder/VQAv2", {"val": "validation"}, from_hub),
    prompt="{question}\n" + SHORT,
    generation=GENERATION,
    sources=(
        "data: https://visualqa.org/download.html, v2_OpenEnded_mscoco_*_questions.json, v2_mscoco_*_annotations.json",
        SHORT_SOURCE,
        "metric and normaliser: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py",
        "dev: 5,000 questions cut from train by the run's seed, whole pictures",
    ),
)
