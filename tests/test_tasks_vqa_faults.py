"""What is wrong in an official file of a task that asks about pictures is one error, which names file and row."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from official_captions import write
from official_vqa import FOLDERS, LABELLED, QUESTIONS

from tasks import aokvqa, gqa, okvqa, pope, scienceqa, textvqa, vizwiz, vqav2
from tasks.task import Task

MODULES = (vqav2, gqa, okvqa, textvqa, vizwiz, scienceqa, pope, aokvqa)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in MODULES}


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a file's content in place: JSON, or a JSON object a line."""
    text = file.read_text()
    if file.name.startswith("coco_pope"):
        rows = [json.loads(row) for row in text.splitlines()]
        change(rows)
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        data = json.loads(text)
        change(data)
        write(file, data)


def refused(name: str, folder: Path, file: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(file)}.*{message}"):
        TASKS[name].load(TASKS[name].parts.tests[0], folder)


@pytest.mark.parametrize("name", TASKS)
def test_broken_and_missing_files_are_refused(tmp_path, name):
    FOLDERS[name](tmp_path)
    part = TASKS[name].parts.tests[0]
    for file in dict.fromkeys((*LABELLED[name], *QUESTIONS[name])):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text[: len(text) // 2])
        refused(name, tmp_path, file, "is not JSON")
        (tmp_path / file).write_bytes(b"\xff\xfe" + text.encode())
        refused(name, tmp_path, file, "UTF-8")
        (tmp_path / file).write_text("[]" if text.startswith("[") else "{}")
        with pytest.raises(ValueError, match=re.escape(file)):
            TASKS[name].load(part, tmp_path)
        (tmp_path / file).unlink()
        with pytest.raises(ValueError, match=r"holds none of|must hold one file"):
            TASKS[name].load(part, tmp_path)
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=r"nowhere.*must be a folder that exists"):
        TASKS[name].load(part, tmp_path / "nowhere")
    assert len(TASKS[name].load(part, tmp_path)) >= 6


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_picture_is_named(tmp_path, name):
    FOLDERS[name](tmp_path)
    part = TASKS[name].parts.tests[0]
    rows = list(TASKS[name].read(tmp_path, part))
    last = rows[-1]["image"]
    row = next(place for place, row in enumerate(rows) if row["image"] == last)
    Path(last).unlink()
    where = {"gqa": f"'{rows[row]['id']}'", "scienceqa": f"'{rows[row]['id']}'", "pope": f"line {row + 1}"}
    refused(name, tmp_path, QUESTIONS[name][0], rf"{where.get(name, f'row {row}')}: there is no image")
    for picture in {row["image"] for row in rows} - {last}:
        Path(picture).unlink()
    with pytest.raises(ValueError, match=r"holds (pictures|any)|there is no image"):
        TASKS[name].load(part, tmp_path)


def again(rows: Any) -> None:
    rows.append(rows[0])


def first(data: Any, key: str = "") -> dict[str, Any]:
    """The row at place 1 of whatever holds the rows."""
    rows = data[key] if key else data
    return list(rows.values())[1] if isinstance(rows, dict) else rows[1]


def set_in(key: str, **fields: Any) -> Callable[[Any], Any]:
    return lambda data: first(data, key).update(fields)


EMPTY = [{"answer": "", "answer_confidence": "yes"}] * 10
BAD: dict[str, dict[str, tuple[str, Callable[[Any], Any], str]]] = {
    "vqav2": {
        "twice": (LABELLED["vqav2"][0], lambda data: again(data["annotations"]), "row 6: the id .* second time"),
        "question twice": (
            QUESTIONS["vqav2"][0],
            lambda data: again(data["questions"]),
            "row 6: the id .* second time",
        ),
        "empty": (
            LABELLED["vqav2"][0],
            set_in("annotations", multiple_choice_answer="", answers=EMPTY),
            "question 10001: 'answers' holds 10 answers, all empty",
        ),
        "type": (QUESTIONS["vqav2"][0], set_in("questions", image_id="8"), "row 1: 'image_id' .* wrong type str"),
    },
    "okvqa": {
        "twice": (LABELLED["okvqa"][0], lambda data: again(data["annotations"]), "row 6: the id .* second time"),
        "question twice": (
            QUESTIONS["okvqa"][0],
            lambda data: again(data["questions"]),
            "row 6: the id .* second time",
        ),
        "empty": (LABELLED["okvqa"][0], set_in("annotations", answers=EMPTY), "row 1: 'answers' holds 10 .* all empty"),
        "no question": (QUESTIONS["okvqa"][0], set_in("questions", question=" "), "row 1: 'question' is empty"),
        "image": (
            LABELLED["okvqa"][0],
            set_in("annotations", image_id=3),
            "row 1: is for image 3, its question is for",
        ),
        "type": (LABELLED["okvqa"][0], set_in("annotations", answers="red"), "row 1: 'answers' .* wrong type str"),
        "entry": (LABELLED["okvqa"][0], set_in("annotations", answers=["red"]), "row 1: got a str where a JSON object"),
    },
    "gqa": {
        "empty": (LABELLED["gqa"][0], set_in("", answer=""), "'00009001': 'answer' is empty"),
        "leaves": (LABELLED["gqa"][0], set_in("", imageId="../../n8"), "'00009001': the file name .* leaves"),
        "type": (LABELLED["gqa"][0], set_in("", imageId=8), "'00009001': 'imageId' .* wrong type int"),
        "types": (LABELLED["gqa"][0], set_in("", types={"semantic": "obj"}), "'00009001', types: has no 'structural'"),
        "no object": (LABELLED["gqa"][0], lambda data: data.update({"1": "x"}), "'1': got a str where a JSON object"),
    },
    "textvqa": {
        "twice": (LABELLED["textvqa"][0], lambda data: again(data["data"]), "row 6: the id 9000 .* second time"),
        "empty": (LABELLED["textvqa"][0], set_in("data", answers=[""] * 10), "row 1: 'answers' holds 10 .* all empty"),
        "none": (LABELLED["textvqa"][0], set_in("data", answers=[]), "row 1: 'answers' holds 0 answers"),
        "leaves": (LABELLED["textvqa"][0], set_in("data", image_id="../../x"), "row 1: the file name .* leaves"),
        "type": (
            LABELLED["textvqa"][0],
            set_in("data", answers=["a", 3]),
            "row 1: 'answers' holds 3, of the wrong type",
        ),
        "id": (LABELLED["textvqa"][0], set_in("data", question_id="1"), "row 1: 'question_id' .* wrong type str"),
    },
    "vizwiz": {
        "twice": (LABELLED["vizwiz"][0], again, "row 6: the id VizWiz_val_00000024.jpg .* second time"),
        "empty": (LABELLED["vizwiz"][0], set_in("", answers=EMPTY), "row 1: 'answers' holds 10 .* all empty"),
        "leaves": (LABELLED["vizwiz"][0], set_in("", image="../val.json"), "row 1: the file name .* leaves"),
        "type": (LABELLED["vizwiz"][0], set_in("", answers=[{"answer": 3}]), "row 1: 'answer' .* wrong type int"),
    },
    "scienceqa": {
        "twice": ("pid_splits.json", lambda data: again(data["test"]), "test row 7: the id 9000 .* second time"),
        "unknown": ("pid_splits.json", lambda data: data["test"].append("77"), "test: the problem '77' is not in"),
        "no list": ("pid_splits.json", lambda data: data.pop("test"), "has no list of problems under 'test'"),
        "type": ("pid_splits.json", lambda data: data["test"].append(3), "test row 7: 3 has the wrong type int"),
        "answer": ("problems.json", lambda data: data["9001"].update(answer=2), "'9001': the right choice is number 2"),
        "before": (
            "problems.json",
            lambda data: data["9001"].update(answer=-1),
            "'9001': the right choice is number -1",
        ),
        "empty": ("problems.json", lambda data: data["9001"].update(choices=["", "no"]), "'9001': .* is empty; fill"),
        "many": ("problems.json", lambda data: data["9001"].update(choices=["a"] * 6), "'9001': has 6 choices"),
        "leaves": ("problems.json", lambda data: data["9001"].update(image="../../../x"), "'9001': .* leaves"),
        "a flag": (
            "problems.json",
            lambda data: data["9001"].update(answer=True),
            "'9001': 'answer' .* wrong type bool",
        ),
    },
    "pope": {
        "twice": (LABELLED["pope"][0], again, "line 9: the id 2 .* second time"),
        "empty": (LABELLED["pope"][0], set_in("", label=""), "line 2: 'label' is empty"),
        "other": (LABELLED["pope"][0], set_in("", label="maybe"), "line 2: 'label' .* must be 'yes' or 'no'"),
        "leaves": (LABELLED["pope"][0], set_in("", image="/etc/passwd"), "line 2: the file name .* leaves"),
        "type": (LABELLED["pope"][0], set_in("", question_id="1"), "line 2: 'question_id' .* wrong type str"),
    },
    "aokvqa": {
        "twice": (LABELLED["aokvqa"][0], again, "row 6: the id q9000 .* second time"),
        "empty": (LABELLED["aokvqa"][0], set_in("", direct_answers=["", ""]), "row 1: .* 2 answers, all empty"),
        "choice": (LABELLED["aokvqa"][0], set_in("", correct_choice_idx=4), "row 1: the right choice is number 4"),
        "type": (LABELLED["aokvqa"][0], set_in("", difficult_direct_answer="no"), "row 1: 'difficult_.* type str"),
        "split": (LABELLED["aokvqa"][0], set_in("", split="train"), "row 1: 'split' .* is not 'val'"),
    },
}
CASES = [(name, case) for name, cases in BAD.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_fault_names_file_and_row(tmp_path, name, case):
    FOLDERS[name](tmp_path)
    file, change, message = BAD[name][case]
    edit(tmp_path / file, change)
    refused(name, tmp_path, file, message)


@pytest.mark.parametrize("name", ["gqa", "scienceqa"])
def test_an_id_that_an_object_has_twice_is_refused(tmp_path, name):
    FOLDERS[name](tmp_path)
    file = tmp_path / LABELLED[name][0]
    text = file.read_text()
    key, row = next(iter(json.loads(text).items()))
    file.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(row)}}}")
    refused(name, tmp_path, file.name, f"'{key}': the id {key} is there a second time")


@pytest.mark.parametrize("name", [name for name in TASKS if name != "vqav2"])
def test_rows_come_before_the_file_is_read_to_its_end(tmp_path, name):
    FOLDERS[name](tmp_path)
    file = tmp_path / QUESTIONS[name][0]
    file.write_text(file.read_text()[:-2])
    rows = TASKS[name].read(tmp_path, TASKS[name].parts.tests[0])
    assert next(rows)["answer"]
    with pytest.raises(ValueError, match=r"is not JSON"):
        list(rows)
