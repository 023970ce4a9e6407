"""What several readers of question files do: find the pictures, and read lists of answers and choices."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.metrics.score import Row
from vlreft.data import files
from vlreft.data.files import Pictures

LETTERS = "ABCDE"  # as many as ScienceQA's scripts know
SHORT = "Answer the question using a single word or phrase."
SHORT_SOURCE = (
    "prompt: LLaVA-1.5, docs/Evaluation.md (short answers); greedy, 16 new tokens (lmms-eval, tasks/gqa/gqa.yaml)"
)
LETTER = "Answer with the option's letter from the given choices directly."
GENERATION = {"max_new_tokens": 16, "do_sample": False}


def pictures(folder: Path, *names: str) -> Pictures:
    """Return the first of these folders in the data's folder that holds pictures. Raises ValueError if none does."""
    for name in names:
        place = folder / name
        if place.is_dir() and any(True for _ in files.pictures_in(place)):
            return Pictures(place)
    raise ValueError(f"{folder}: no folder of {list(names)} in it holds pictures; put the official ones there.")


def commonest(answers: Sequence[str], where: str) -> str:
    """Return the commonest answer that is not empty, the first of several. Raises ValueError if all are empty."""
    counts = Counter(answer for answer in answers if answer.strip())
    if not counts:
        raise ValueError(f"{where}: 'answers' holds {len(answers)} answers, all empty; fill one in or drop the row.")
    return counts.most_common(1)[0][0]


def texts(row: Row, key: str, where: str) -> list[str]:
    """Return `row[key]` if it is a list of texts; those may be empty, as an annotator's answer may."""
    found = files.value(row, key, list, where)
    for entry in found:
        if not isinstance(entry, str):
            raise ValueError(f"{where}: {key!r} holds {entry!r}, of the wrong type {type(entry).__name__}.")
    return found


def answers_of(row: Row, where: str) -> list[str]:
    """Return each annotator's answer, of `"answers": [{"answer": "yes", ...}, ...]`."""
    answers = files.value(row, "answers", list, where)
    return [files.value(files.mapping(answer, where), "answer", str, where) for answer in answers]


def choice(choices: Sequence[str], place: int, where: str) -> str:
    """Return the right choice. Raises ValueError if there is none at this place, or an empty one."""
    if not 0 <= place < len(choices):
        raise ValueError(f"{where}: the right choice is number {place} (from 0) of {len(choices)}; mend it.")
    if not choices[place].strip():
        raise ValueError(f"{where}: the right choice, number {place} (from 0), is empty; fill it in or drop the row.")
    return choices[place]


def lettered(choices: Sequence[str]) -> str:
    """Write the choices as lines, `A. cat` first."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))


def entry(name: Any, image: Any, question: str, answer: str, references: Sequence[str]) -> dict[str, Any]:
    """Make a row of a question about a picture."""
    columns = {"id": str(name), "image": image, "question": question}
    return {**columns, "answer": answer, "references": list(references)}
