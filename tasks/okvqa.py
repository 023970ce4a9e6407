"""OK-VQA: questions about COCO's pictures that need outside knowledge, with ten answers each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.metrics.score import Row
from tasks.metrics.vqa import vqa_accuracy
from tasks.reading import GENERATION, SHORT, SHORT_SOURCE, answers_of, commonest, entry, pictures
from tasks.task import VQA_FEATURES, Hub, Parts, Task
from vlreft.data import files


def find(folder: Path, part: str) -> list[Path]:
    """Return the part's questions and annotations file: of `train` or `val`."""
    names = f"OpenEnded_mscoco_{part}2014_questions.json", f"mscoco_{part}2014_annotations.json"
    return [files.find_file(folder, name) for name in names]


def read(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the questions file with the answers of the annotations file."""
    questions, notes = find(folder, part)
    home = pictures(folder, f"{part}2014", f"images/{part}2014", "images")
    pairs = files.paired(
        files.json_rows(questions, "questions"),
        files.json_rows(notes, "annotations"),
        *("question_id", int, ("question", "annotation")),
    )
    for (where, question), (where_note, note) in pairs:
        image_id = files.value(question, "image_id", int, where)
        if files.value(note, "image_id", int, where_note) != image_id:
            raise ValueError(f"{where_note}: is for image {note['image_id']}, its question is for image {image_id}.")
        answers = answers_of(note, where_note)
        image = str(home.numbered(image_id, where))
        answer = commonest(answers, where_note)
        yield entry(question["question_id"], image, files.text(question, "question", where), answer, answers)


def from_hub(row: Row) -> dict[str, Any]:
    """Read a row of the hub's data set."""
    answers = row["answers"]
    where = f"the hub's question {row['question_id']}"
    return entry(row["question_id"], row["image"], row["question"], commonest(answers, where), answers)


def line(row: Row, answer: str) -> dict[str, Any]:
    """Make an entry of the results file of VQA's script."""
    return {"question_id": int(row["id"]), "answer": answer}


TASK = Task(
    name="okvqa",
    title="OK-VQA: questions that need outside knowledge, soft accuracy over ten answers",
    kind="generate",
    parts=Parts(train="train", tests=("val",), num_dev=1000),
    features=VQA_FEATURES,
    read=read,
    files=find,
    metric=vqa_accuracy("vqav2"),
    line=line,
    hub=Hub("lmms-lab-encoder/OK-VQA", {"val": "val2014"}, from_hub),
    prompt="{question}\n" + SHORT,
    generation=GENERATION,
    sources=(
        "data: https://okvqa.allenai.org/download.html (1.1), pictures of COCO 2014",
        "answers: the field `answer`, stemmed by the authors; five annotators', each there twice, so ten",
        SHORT_SOURCE,
        "metric and normaliser: VQA's, GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py",
        "test: val2014 (5,046 questions), the paper's test set",
        "dev: 1,000 questions cut from train by the run's seed, whole pictures",
    ),
)
