"""The tasks that ask about pictures: rows of official files by hand, submissions, hub rows."""

import json
import re
import string
from pathlib import Path
from typing import Any

import datasets
import pytest
from official_vqa import FOLDERS, LABELLED, annotators

from tasks import aokvqa, gqa, okvqa, pope, scienceqa, textvqa, vizwiz, vqav2
from tasks.reading import commonest, lettered
from tasks.task import Task, without_pictures

MODULES = (vqav2, gqa, okvqa, textvqa, vizwiz, scienceqa, pope, aokvqa)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in MODULES}
NUM_ROWS = {
    "vqav2": {"train": 24, "val": 6},
    "gqa": {"train": 24, "val": 6, "testdev": 6},
    "okvqa": {"train": 24, "val": 6},
    "textvqa": {"train": 24, "val": 6},
    "vizwiz": {"train": 24, "val": 6},
    "scienceqa": {"train": 24, "val": 6, "test": 6},
    "pope": {"random": 8, "popular": 8, "adversarial": 8},
    "aokvqa": {"train": 24, "val": 6},
}
PARTS = [(name, part) for name, parts in NUM_ROWS.items() for part in parts]
PROMPTS = {
    **dict.fromkeys(TASKS, "is it red ?\nAnswer the question using a single word or phrase."),
    "vizwiz": "is it red ?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    "scienceqa": "Context: look .\nis it red ?\nA. yes\nB. no\n"
    "Answer with the option's letter from the given choices directly.",
}
TEN = [entry["answer"] for entry in annotators("circle")]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The official files of every task, each in a folder of its name."""
    path = tmp_path_factory.mktemp("official")
    for name, make in FOLDERS.items():
        (path / name).mkdir()
        make(path / name)
    return path


def load(home: Path, name: str, part: str) -> list[dict[str, Any]]:
    """All rows of a part, `image` as a path below the folder."""
    rows = TASKS[name].load(part, home / name)
    assert dict(rows.features) == dict(TASKS[name].features)
    folder = home / name
    return [{**row, "image": Path(row["image"]["path"]).relative_to(folder).as_posix()} for row in rows]


# --- rows ---------------------------------------------------------------------------------------------------------

SECOND = {"question": "is there a red circle ?", "answer": "yes"}
ANSWERED = {**SECOND, "references": ["yes"] * 8 + ["nothing", "white"]}
COCO_8 = "val2014/COCO_val2014_000000000008.jpg"
ROWS = {  # of each task: a part, the place of a row, and the row
    "vqav2": ("train", 1, {"id": "1001", "image": "train2014/COCO_train2014_000000000000.jpg", **ANSWERED}),
    "okvqa": ("train", 1, {"id": "1001", "image": "train2014/COCO_train2014_000000000000.jpg", **ANSWERED}),
    "textvqa": ("train", 1, {"id": "1001", "image": "train_images/0000000000000000.jpg", **ANSWERED}),
    "aokvqa": (
        *("train", 1),
        {"id": "q1001", "image": "train2017/000000000000.jpg", **ANSWERED}
        | {"choices": ["large", "yes", "no", "small"], "correct": "yes", "difficult_direct_answer": False},
    ),
    "gqa": (
        *("train", 1),
        {"id": "00001001", "image": "images/n0.jpg", **SECOND, "references": ["yes"]}
        | {"structural": "verify", "semantic": "obj"},
    ),
    "vizwiz": (
        *("val", 1),
        {
            "id": "VizWiz_val_00000025.jpg",
            "image": "val/VizWiz_val_00000025.jpg",
            "question": "is there a green star ?",
            "answer": "yes",
            "references": ["yes"] * 8 + ["nothing", "white"],
        },
    ),
    "scienceqa": (
        *("test", 0),
        {
            "id": "9000",
            "image": "images/test/9000/image.png",
            "question": "what is the shape of the red object ?",
            "answer": "B",
            "references": ["B"],
            "context": "Context: look at the object .\n",
            "options": "A. circle\nB. square\nC. triangle\nD. star",
            "choices": ["circle", "square", "triangle", "star"],
            "has_image": True,
        },
    ),
    "pope": (
        *("popular", 1),
        {
            "id": "3",
            "image": COCO_8,
            "question": "is there a red star ?",
            "answer": "no",
            "references": ["no"],
            "category": "popular",
        },
    ),
}


def test_every_task_has_a_folder_and_a_row_by_hand():
    assert set(FOLDERS) == set(TASKS) == set(NUM_ROWS) == set(ROWS) == set(SUBMISSIONS)


@pytest.mark.parametrize("name", TASKS)
def test_a_row_is_as_by_hand(home, name):
    part, place, expected = ROWS[name]
    assert load(home, name, part)[place] == expected


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_every_part_loads_with_unique_ids_and_pictures_that_are_there(home, name, part):
    rows = load(home, name, part)
    assert len(rows) == NUM_ROWS[name][part]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all((home / name / row["image"]).is_file() for row in rows)
    assert all(row["answer"] in row["references"] for row in rows)


@pytest.mark.parametrize("name", TASKS)
def test_the_parts_are_those_of_the_files_and_tests_share_no_picture_with_training(home, name):
    parts = TASKS[name].parts
    named = {part for part in (parts.train, parts.dev, *parts.tests) if part is not None}
    assert named <= set(NUM_ROWS[name])
    assert parts.train is None or len({row["image"] for row in load(home, name, parts.train)}) >= 8
    assert parts.train is not None or parts.train_on in TASKS

    def contents(part: str) -> set[bytes]:
        return {(home / name / row["image"]).read_bytes() for row in load(home, name, part)}

    for part in named - {parts.train, *parts.tests}:
        assert not contents(part) & contents(parts.tests[0])
    if parts.train is not None:
        assert not contents(parts.train) & contents(parts.tests[0])


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answers_score_one_and_wrong_ones_less(home, name):
    part = TASKS[name].parts.tests[0]
    rows = load(home, name, part)
    assert TASKS[name].metric([row["answer"] for row in rows], rows).value == pytest.approx(1.0)
    assert TASKS[name].metric(["nonsense, not"] * len(rows), rows).value == 0.0


def test_the_official_scores_of_parts(home):
    rows = load(home, "aokvqa", "val")
    answers = [row["correct"] if row["difficult_direct_answer"] else "yes" for row in rows]
    score = TASKS["aokvqa"].metric(answers, rows)
    # Of six questions two do not count; of the other four "yes" is right for two, and a choice for the four first.
    assert (score.value, score.parts) == (0.5, {"multiple_choice": pytest.approx(4 / 6)})
    rows = load(home, "gqa", "testdev")
    score = TASKS["gqa"].metric(["Yes."] * 6, rows)
    assert score.parts["query"] == score.parts["open"] == 0.0
    assert score.parts["verify"] == score.parts["binary"] == 0.5
    assert TASKS["scienceqa"].metric(["A"] * 6, load(home, "scienceqa", "test")).parts == {"img_accuracy": 2 / 6}


def test_the_demo_data_are_folders_of_vqav2():
    folder = Path(__file__).parent.parent / "assets" / "demo-vqa" / "code"
    for part in ("train", "dev", "test"):
        questions = json.loads((folder / f"{part}_questions.json").read_text())["questions"]
        rows = TASKS["vqav2"].load(part, folder)
        assert rows["id"][:] == [str(question["question_id"]) for question in questions]


@pytest.mark.parametrize("name", TASKS)
def test_the_prompt_is_the_official_one_and_has_no_label(name):
    row = {"question": "is it red ?", "context": "Context: look .\n", "options": lettered(["yes", "no"])}
    assert TASKS[name].prompt.format(**row) == PROMPTS[name]
    fields = {field for _, field, _, _ in string.Formatter().parse(TASKS[name].prompt) if field}
    assert not fields & {"answer", "references", "correct"}
    assert TASKS[name].generation == {"max_new_tokens": 16, "do_sample": False}


@pytest.mark.parametrize("name", TASKS)
def test_labels_do_not_change_what_is_asked(home, tmp_path, name):
    part = TASKS[name].parts.tests[0]
    prompts = [TASKS[name].prompt.format_map(row) for row in load(home, name, part)]
    FOLDERS[name](tmp_path)
    for file in LABELLED[name]:
        text = (tmp_path / file).read_text()
        text = re.sub(r'("(?:answer|multiple_choice_answer)": ?)"[^"]*"', r'\1"zib"', text)
        text = re.sub(r'("answers": ?\[)"[^]]*\]', r'\1"zib"]', text)
        text = re.sub(r'("direct_answers": ?\[)"[^]]*\]', r'\1"zib"]', text)
        text = re.sub(r'("(?:answer|correct_choice_idx)": ?)\d', r"\g<1>0", text)
        text = text.replace('"label": "no"', '"label": "yes"')
        assert text != (tmp_path / file).read_text()
        (tmp_path / file).write_text(text)
    rows = list(TASKS[name].read(tmp_path, part))
    assert [TASKS[name].prompt.format_map(row) for row in rows] == prompts
    assert len({row["answer"] for row in rows}) == 1


@pytest.mark.parametrize("name", TASKS)
def test_a_second_load_reads_no_file_again(tmp_path, monkeypatch, name):
    FOLDERS[name](tmp_path)
    part = TASKS[name].parts.tests[0]
    first = TASKS[name].load(part, tmp_path)
    opened: list[Path] = []
    real = Path.open

    def spy(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", spy)
    assert TASKS[name].load(part, tmp_path).to_dict() == first.to_dict()
    assert [path for path in opened if path.is_relative_to(tmp_path)] == []
    file = TASKS[name].files(tmp_path, part)[0]
    file.write_text(file.read_text() + "\n")
    TASKS[name].load(part, tmp_path)
    assert file in opened  # a changed file is read, and the spy sees it


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa", "vizwiz", "aokvqa"])
def test_an_annotators_answer_may_be_empty(tmp_path, name):
    FOLDERS[name](tmp_path)
    file = tmp_path / LABELLED[name][0]
    text = file.read_text().replace('"nothing"', '""').replace('"white"', '""')
    file.write_text(text)
    row = next(TASKS[name].read(tmp_path, TASKS[name].parts.tests[0]))
    assert row["references"][8:] == ["", ""]
    assert row["answer"] == row["references"][0]


def test_the_commonest_answer_is_the_first_of_several_and_not_empty():
    assert commonest(["", "a", "b", "", "b", "a", ""], "x") == "a"
    assert commonest(["a", "b", "b"], "x") == "b"
    with pytest.raises(ValueError, match=r"f\.json, row 2: 'answers' holds 2 answers, all empty"):
        commonest(["", " "], "f.json, row 2")


def test_scienceqa_leaves_problems_without_a_picture_out_and_reads_other_lists(home):
    assert len(json.loads((home / "scienceqa" / "pid_splits.json").read_text())["test"]) == 7
    test = load(home, "scienceqa", "test")
    assert [row["context"] != "" for row in test] == [True, False, False, True, False, False]
    assert test[1]["options"] == "A. yes\nB. no"
    assert lettered(["small", "large"]) == "A. small\nB. large"


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("gqa", {"testdev_balanced_questions.json": "questions1.2/testdev_balanced_questions.json"}),
        ("okvqa", {"val2014": "images/val2014"}),
        ("textvqa", {"train_images": "train_val_images/train_images"}),
        ("vizwiz", {"val.json": "Annotations/val.json", "val": "images/val"}),
        ("scienceqa", {name: f"data/scienceqa/{name}" for name in ("problems.json", "pid_splits.json", "images")}),
        ("pope", {"coco_pope_random.json": "output/coco/coco_pope_random.json", "val2014": "images"}),
        ("aokvqa", {"aokvqa_v1p0_val.json": "aokvqa/aokvqa_v1p0_val.json", "val2017": "coco/val2017"}),
    ],
)
def test_files_may_be_where_the_archives_put_them(tmp_path, name, moves):
    FOLDERS[name](tmp_path)
    part = TASKS[name].parts.tests[0]
    before = [{**row, "image": Path(row["image"]).name} for row in TASKS[name].read(tmp_path, part)]
    for old, new in moves.items():
        (tmp_path / new).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / old).rename(tmp_path / new)
    assert [{**row, "image": Path(row["image"]).name} for row in TASKS[name].read(tmp_path, part)] == before
    assert all(file.is_file() for file in TASKS[name].files(tmp_path, part))


# --- submissions and the hub --------------------------------------------------------------------------------------

SUBMISSIONS = {  # of the row above, answered with "Star."
    "vqav2": {"question_id": 1001, "answer": "Star."},
    "okvqa": {"question_id": 1001, "answer": "Star."},
    "textvqa": {"question_id": 1001, "answer": "Star."},
    "gqa": {"questionId": "00001001", "prediction": "star"},
    "vizwiz": {"image": "VizWiz_val_00000025.jpg", "answer": "Star."},
    "pope": {"question": "is there a red star ?", "answer": "Star."},
    "aokvqa": {"q1001": {"direct_answer": "Star.", "multiple_choice": "Star."}},
    "scienceqa": {
        "question_id": "9000",
        "prompt": "<image>\nContext: look at the object .\nwhat is the shape of the red object ?\n"
        "A. circle\nB. square\nC. triangle\nD. star\nAnswer with the option's letter from the given choices directly.",
        "text": "Star.",
    },
}


@pytest.mark.parametrize("name", TASKS)
def test_submissions(home, name):
    part, place, _ = ROWS[name]
    line = TASKS[name].line(load(home, name, part)[place], "Star.")
    assert line == SUBMISSIONS[name]
    assert json.loads(json.dumps(line)) == line


def test_a_folder_of_ones_own_may_have_texts_as_ids():
    assert TASKS["vqav2"].line({"id": "a7"}, "yes") == {"question_id": "a7", "answer": "yes"}


COCO_COLUMNS = {"image": None, "question": "what is it ?"}
COMMON = {**COCO_COLUMNS, "answer": "circle", "references": TEN}
HUB = {
    "vqav2": (
        {
            **COCO_COLUMNS,
            "question_type": "what is",
            "multiple_choice_answer": "circle",
            "answers": annotators("circle"),
            "image_id": 9,
            "answer_type": "other",
            "question_id": 9000,
        },
        {**COMMON, "id": "9000"},
    ),
    "okvqa": (
        {**COCO_COLUMNS, "question_id": "2971475", "answers": TEN, "question_type": "four", "answer_type": "other"},
        {**COMMON, "id": "2971475"},
    ),
    "textvqa": (
        {
            **COCO_COLUMNS,
            "image_id": "003a8ae2ef43b901",
            "question_id": 34602,
            "answers": TEN,
            "ocr_tokens": ["dakota"],
        },
        {**COMMON, "id": "34602"},
    ),
    "vizwiz": (
        {**COCO_COLUMNS, "question_id": "VizWiz_val_00000000", "answers": TEN, "category": "other"},
        {**COMMON, "id": "VizWiz_val_00000000.jpg"},
    ),
    "pope": (
        {
            **COCO_COLUMNS,
            "id": "0",
            "question_id": "1",
            "answer": "yes",
            "image_source": "COCO_val2014_000000310196",
            "category": "adversarial",
        },
        {**COCO_COLUMNS, "id": "1", "answer": "yes", "references": ["yes"], "category": "adversarial"},
    ),
    "aokvqa": (
        {
            **COCO_COLUMNS,
            "question_id": "22MexNkBPpdZGX6sxbxVBH",
            "choices": ["circle", "square", "triangle", "star"],
            "correct_choice_idx": 3,
            "direct_answers": str(TEN),
            "difficult_direct_answer": False,
            "rationales": ["look ."],
        },
        {**COMMON, "id": "22MexNkBPpdZGX6sxbxVBH", "choices": ["circle", "square", "triangle", "star"]}
        | {"correct": "star", "difficult_direct_answer": False},
    ),
}


def test_the_tasks_on_the_hub():
    assert {name for name, task in TASKS.items() if task.hub is not None} == set(HUB)
    for name in ("gqa", "scienceqa"):
        with pytest.raises(ValueError, match="give its files with `--data`"):
            TASKS[name].load("train")


@pytest.mark.parametrize("name", HUB)
def test_hub_rows(name, home, monkeypatch):
    given, expected = HUB[name]
    hub = TASKS[name].hub
    assert hub is not None
    assert hub.row(given) == expected
    # As `load` reads them: pictures stay encoded, and what is read without them is the same.
    picture = str(home / "okvqa" / COCO_8)
    stored = datasets.Dataset.from_list([{**given, "image": picture}]).cast_column("image", datasets.Image())
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: (asked.append((*args, split)), stored)[1])
    for part, split in hub.parts.items():
        rows = TASKS[name].load(part)
        assert asked.pop() == (hub.name, hub.config, split)
        assert {**rows[0], "image": None} == expected
        assert rows[0]["image"]["path"] == picture
        assert without_pictures(rows)[0] == expected
        assert set(rows[0]) == set(TASKS[name].features)
    assert set(hub.parts) <= set(NUM_ROWS[name])
