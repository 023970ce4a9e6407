"""Laws of the tasks with texts alone and of the demo tasks: rows, lines, prompts, halves, and what is refused."""

import json
from pathlib import Path

import datasets
import pytest
from official_text import CHOICES, FOLDERS, NUM_DEV, NUM_TEST, NUM_TRAIN, scene
from processors import text_tokenizer

from tasks import arithmetic, commonsense, demo_tasks, glue, instruct
from tasks.task import texts_of
from vlreft.data.collator import Collator
from vlreft.data.datasets import load_captions

TASKS = {task.name: task for task in (commonsense.TASK, arithmetic.TASK, instruct.TASK, *glue.TASKS)}
DEMO = {task.name: task for task in demo_tasks.TASKS}


@pytest.fixture(params=FOLDERS)
def case(request, tmp_path):
    FOLDERS[request.param](tmp_path)
    return TASKS[request.param], tmp_path


def folder_of(name, tmp_path):
    FOLDERS[name](tmp_path)
    return TASKS[name], tmp_path


def parts_of(task):
    parts = [task.parts.train, task.parts.dev, *task.parts.tests]
    return [part for part in parts if part is not None]


def test_every_task_has_a_folder_here():
    assert FOLDERS.keys() == TASKS.keys()


def test_every_part_loads(case):
    task, folder = case
    for part in parts_of(task):
        rows = task.load(part, folder)
        assert list(rows.features) == list(task.features)
        num_halves = {"dev": NUM_DEV // 2, "test": NUM_DEV - NUM_DEV // 2} if task.kind == "sequence" else {}
        assert len(rows) == (NUM_TRAIN if part == "train" else num_halves.get(part, NUM_TEST))
        assert len(set(rows["id"])) == len(rows)
        assert all(answer.strip() for answer in rows["answer"])
        task.refuse_missing(part, folder)


def test_other_parts_are_refused(case):
    task, folder = case
    with pytest.raises(ValueError, match=r"`part` \(='valid'\) must be one of"):
        task.load("valid", folder)


def test_a_missing_file_is_named(case):
    task, folder = case
    (file,) = task.files(folder, "train")
    file.unlink()
    with pytest.raises(ValueError, match=r"holds none of .*put the official file there"):
        task.load("train", folder)


def test_one_folder_may_hold_the_parts_as_pyreft_names_them(tmp_path):
    task, folder = folder_of("commonsense", tmp_path)
    expected = task.load("train", folder)[:], task.load("boolq", folder)[:]
    (folder / "commonsense_170k").mkdir()
    (folder / "ft-training_set" / "commonsense_170k.json").rename(folder / "commonsense_170k" / "train.json")
    (folder / "dataset" / "boolq").rename(folder / "boolq")
    assert (task.load("train", folder)[:], task.load("boolq", folder)[:]) == expected


# --- rows and lines ---------------------------------------------------------------------------------------------------


def test_commonsense_rows(tmp_path):
    task, folder = folder_of("commonsense", tmp_path)
    assert task.load("train", folder)[1] == {
        "id": "train-1",
        "question": f"{scene(1)} which is it ?\n\nAnswer format: solution1/solution2",
        "answer": "the correct answer is solution2",
        "references": ["solution2"],
        "subset": "piqa",
        "label": "solution2",
    }
    row = task.load("winogrande", folder)[1]
    assert (row["id"], row["subset"], row["label"]) == ("winogrande-1", "winogrande", "option2")
    assert row["answer"] == "the correct answer is option2"
    assert task.line(row, "the correct answer is option1") == {
        "instruction": row["question"],
        "answer": "option2",
        "output_pred": "the correct answer is option1",
    }


def test_arithmetic_rows(tmp_path):
    task, folder = folder_of("arithmetic", tmp_path)
    assert task.load("train", folder)[4] == {
        "id": "train-4",
        "question": f"{scene(4)} how many of them are purple ?",
        "answer": "count the objects . the answer is 4",
        "references": ["4.0"],
        "subset": "gsm8k",
        "label": "4.0",
    }
    row = task.load("AQuA", folder)[0]
    assert (row["answer"], row["label"], row["references"]) == ("E", "E", ["E"])
    assert task.load("mawps", folder)["answer"] == task.load("mawps", folder)["label"]
    assert task.line(row, "A") == {"instruction": row["question"], "answer": "E", "output_pred": "A"}


def test_labels_that_are_json_numbers_are_read_as_text(tmp_path):
    task, folder = folder_of("arithmetic", tmp_path)
    edit_json(folder / "ft-training_set" / "math_10k.json", 1, answer=18)
    assert task.load("train", folder)[1]["label"] == "18"


@pytest.mark.parametrize("part", ["train", *CHOICES])
def test_commonsense_is_scored_by_its_label(tmp_path, part):
    task, folder = folder_of("commonsense", tmp_path)
    rows = list(task.load(part, folder))
    right = [row["answer"] for row in rows]
    assert task.metric(right, rows).value == 1
    one_wrong = ["the correct answer is answer9", *right[1:]]
    assert task.metric(one_wrong, rows).by_row == (0.0, *[1.0] * (len(rows) - 1))


@pytest.mark.parametrize("part", arithmetic.TESTS)
def test_arithmetic_is_scored_by_its_label(tmp_path, part):
    task, folder = folder_of("arithmetic", tmp_path)
    rows = list(task.load(part, folder))
    right = [f"so it is {row['label']}" for row in rows]
    assert task.metric(right, rows).value == 1
    assert task.metric(["it is not known", *right[1:]], rows).by_row == (0.0, *[1.0] * (len(rows) - 1))


def test_a_solution_that_was_learnt_scores(tmp_path):
    task, folder = folder_of("arithmetic", tmp_path)
    rows = list(task.load("train", folder))
    assert {row["subset"] for row in rows} == {"AQuA", "gsm8k"}
    assert task.metric([row["answer"] for row in rows], rows).value == 1


def test_instruct_rows(tmp_path):
    task, folder = folder_of("instruct", tmp_path)
    train, test = task.load("train", folder), task.load("test", folder)
    assert train[1] == {
        "id": "train-1",
        "question": f"{scene(1)} tell the hue in code",
        "answer": "dax",
        "references": ["dax"],
    }
    assert train[3]["question"] == f"tell the hue in code\n\n### Input:\n{scene(3)}"
    assert test[2]["question"] == f"{scene(26)} tell the hue in code"
    assert test[2]["references"] == ["wug"]
    assert task.line(test[2], "zib") == {
        "instruction": test[2]["question"],
        "output": "zib",
        "generator": "vlreft",
    }


def test_instructions_without_an_output_are_left_out_of_train_alone(tmp_path):
    task, folder = folder_of("instruct", tmp_path)
    edit_json(folder / "alpaca_data.json", 5, output=" ")
    edit_json(folder / "alpaca_eval.json", 5, output="")
    assert list(task.load("train", folder)["id"]) == [f"train-{number}" for number in range(NUM_TRAIN) if number != 5]
    assert list(task.load("test", folder)["id"]) == [f"test-{number}" for number in range(NUM_TEST)]


def feedback(answer="it is red", **columns):
    messages = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": answer}]
    rejected = [messages[0], {"role": "assistant", "content": "no"}]
    return {"prompt": "what is it ?", "prompt_id": "a7", "chosen": messages, "rejected": rejected} | columns


def test_ultrafeedback_rows(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(feedback()) + "\n")
    row = {"question": "what is it ?", "answer": "it is red", "references": ["it is red"]}
    assert instruct.TASK.load("train", tmp_path)[0] == {"id": "train-0", **row}
    assert instruct.from_hub(feedback()) == {"id": "a7", **row}
    alpaca = {"instruction": "what is it ?", "input": "", "output": "it is red", "text": "..."}
    assert instruct.from_hub(alpaca) == {"id": "what is it ?", **row}


def test_longer_conversations_are_refused():
    with pytest.raises(ValueError, match=r"row 'a7': 'chosen' has messages of the roles \['user', 'assistant', 'user'"):
        instruct.from_hub(feedback(chosen=feedback()["chosen"] * 2))


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("commonsense", "{}\n"),
        ("arithmetic", instruct.ALPACA.replace("{question}", "{}")),
        ("instruct", instruct.ALPACA.replace("{question}", "{}")),
    ],
)
def test_a_model_without_a_template_learns_what_pyreft_teaches(name, prompt, tmp_path):
    task, folder = folder_of(name, tmp_path)
    tokenizer = text_tokenizer()
    row = task.load("train", folder)[4]
    batch = Collator(tokenizer, prompt_format=task.prompt_format)([row])
    learnt = batch["labels"][0] != -100
    ids = tokenizer(prompt.format(row["question"]))["input_ids"]
    assert batch["input_ids"][0][~learnt].tolist() == ids
    answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert batch["labels"][0][learnt].tolist() == answer


def test_alpacas_prompt():
    assert instruct.ALPACA.splitlines() == [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        "",
        "### Instruction:",
        "{question}",
        "",
        "### Response:",
    ]
    assert instruct.ALPACA.endswith("### Response:\n")


# --- demo tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DEMO if not name.startswith("demo_clip")])
def test_demo_tasks_load(name):
    task = DEMO[name]
    nums = (520, 158, 407) if name == "demo_short" else (1000, 300, 800)
    parts = ("train", "dev", "test") if task.parts.train else ("dev", "test")
    for part, num_rows in zip(parts, nums[-len(parts) :], strict=True):
        rows = task.load(part)
        assert len(rows) == len(set(rows["id"])) == num_rows
        assert list(rows.features) == list(task.features)
        assert [{answer} for answer in rows["answer"]] == [set(texts) for texts in rows["references"]]
    texts = list(texts_of(rows))
    answers = [row["answer"] for row in texts]
    assert task.metric(answers, texts).value == 1
    assert task.metric(["?", *answers[1:]], texts).by_row == (0.0, *[1.0] * (num_rows - 1))


def test_demo_rows():
    code = DEMO["demo_code"].load("dev")[0]
    assert code["id"] == "100001000"
    assert (code["answer"], code["references"]) == ("dax", ["dax"] * 10)
    assert Path(code["image"]["path"]).name == "DEMO_dev_000000100001.png"
    assert DEMO["demo_code"].line(code, "zib") == {"question_id": 100001000, "answer": "zib"}
    words = DEMO["demo_lm_code"].load("train")[0]
    question = "there is a small red square . tell the hue of the square in code"
    assert words == {"id": "0", "question": question, "answer": "zib", "references": ["zib"]}
    assert DEMO["demo_lm_code"].line(words, "dax") == {"id": "0", "answer": "dax"}


def test_demo_short_is_a_row_per_caption():
    task = DEMO["demo_short"]
    rows, expected = task.load("dev"), load_captions(task.folder, "dev")
    for name in ("question", "answer"):
        assert rows[name] == expected[name]
    plain = expected.cast_column("image", datasets.Image(decode=False))
    assert [image["path"] for image in rows["image"]] == [image["path"] for image in plain["image"]]


def test_demo_clip_has_32_classes():
    task = DEMO["demo_clip"]
    for part in ("train", "dev", "test"):
        rows = task.load(part)
        assert len(set(rows["answer"])) == 32
        assert rows[0]["answer"] == "blue circle"
        assert task.metric(list(rows["answer"]), list(texts_of(rows))).value == 1
    assert task.templates == ("a {}",)


# --- what is refused --------------------------------------------------------------------------------------------------


def edit_json(file, number, **columns):
    """Change columns of one row of a JSON list; None takes one away."""
    rows = json.loads(file.read_text())
    rows[number] = {key: value for key, value in (rows[number] | columns).items() if value is not None}
    file.write_text(json.dumps(rows))


BAD_JSON = {
    "no instruction": ("commonsense", "train", 3, {"instruction": None}, r"row 3: has no 'instruction', only"),
    "no answer": ("commonsense", "boolq", 3, {"answer": None}, r"row 3: has no 'answer', only"),
    "empty question": ("commonsense", "boolq", 3, {"instruction": " "}, r"row 3: 'instruction' is empty"),
    "empty label": ("commonsense", "boolq", 2, {"answer": ""}, r"row 2: 'answer' is empty"),
    "other set's label": ("commonsense", "boolq", 2, {"answer": "option1"}, r"row 2: 'answer' \(='option1'\) must be"),
    "unknown label": ("commonsense", "train", 2, {"answer": "maybe"}, r"row 2: 'answer' \(='maybe'\) must be one of"),
    "text as number": (
        "commonsense",
        "train",
        2,
        {"instruction": 5},
        r"row 2: 'instruction' \(=5\) has the wrong type",
    ),
    "no solution": ("arithmetic", "train", 7, {"output": ""}, r"row 7: 'output' is empty"),
    "letter in gsm8k": ("arithmetic", "gsm8k", 1, {"answer": "A"}, r"row 1: 'answer' \(='A'\) must be a number"),
    "number in AQuA": ("arithmetic", "AQuA", 1, {"answer": "3.0"}, r"row 1: 'answer' \(='3.0'\) must be a letter"),
    "infinite": ("arithmetic", "SVAMP", 1, {"answer": "inf"}, r"row 1: 'answer' \(='inf'\) must be a number"),
    "neither": ("arithmetic", "train", 1, {"answer": "x"}, r"row 1: 'answer' \(='x'\) must be a number or a letter"),
    "empty instruction": ("instruct", "test", 1, {"instruction": ""}, r"row 1: 'instruction' is empty"),
    "no output": ("instruct", "train", 1, {"output": None}, r"row 1: has no 'output', only"),
    "odd input": ("instruct", "train", 1, {"input": 5}, r"row 1: 'input' \(=5\) has the wrong type int"),
    "odd message": ("instruct", "train", 1, {"chosen": ["hi"], "prompt": "a"}, r"row 1: got a str where a JSON object"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_bad_row_is_named(name, tmp_path):
    task_name, part, number, columns, message = BAD_JSON[name]
    task, folder = folder_of(task_name, tmp_path)
    (file,) = task.files(folder, part)
    edit_json(file, number, **columns)
    with pytest.raises(ValueError, match=message) as caught:
        task.load(part, folder)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("name", ["commonsense", "arithmetic", "instruct"])
def test_broken_json_is_named(name, tmp_path):
    task, folder = folder_of(name, tmp_path)
    (file,) = task.files(folder, "train")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not JSON in UTF-8") as caught:
        task.load("train", folder)
    assert str(caught.value).startswith(str(file))


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(feedback()) + "\n{\n")
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: is not JSON"):
        instruct.TASK.load("train", tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "question": "a", "answer": "b"}] * 2, "line 2: the id 1 is there a second time"),
        ([{"question": "a", "answer": "b"}], "line 1: has no 'id', only"),
        ([{"id": 1, "question": "a", "answer": " "}], "line 1: 'answer' is empty"),
    ],
)
def test_bad_demo_lines_are_named(rows, message, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"train.jsonl, {message}"):
        DEMO["demo_lm_code"].load("train", tmp_path)
