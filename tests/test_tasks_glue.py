"""Laws of the GLUE tasks: rows and lines of eight tables, the halves of the official dev set, and what is refused."""

import datasets
import official_text
import pytest
import torch
from official_text import FOLDERS, NUM_DEV, NUM_TRAIN, pair, scene

from tasks import glue
from tasks.task import texts_of

TASKS = {task.name: task for task in glue.TASKS}


def folder_of(name, tmp_path):
    FOLDERS[name](tmp_path)
    return TASKS[name], tmp_path


GLUE_ROWS = {
    "glue_mnli": ("neutral", "neutral"),
    "glue_sst2": ("positive", 1),
    "glue_mrpc": ("equivalent", 1),
    "glue_cola": ("acceptable", 1),
    "glue_qnli": ("not_entailment", "not_entailment"),
    "glue_qqp": ("duplicate", 1),
    "glue_rte": ("not_entailment", "not_entailment"),
    "glue_stsb": ("0.000", 0.0),
}


@pytest.mark.parametrize("name", TASKS)
def test_glue_rows(name, tmp_path):
    task, folder = folder_of(name, tmp_path)
    answer, prediction = GLUE_ROWS[name]
    first, second = pair(1)
    texts = {
        "glue_cola": (scene(1), ""),
        "glue_sst2": (first, ""),
        "glue_qnli": (second, first),
    }.get(name, (first, second))
    row = task.load("train", folder)[1]
    assert row == {"id": "1", "text": texts[0], "text_pair": texts[1], "answer": answer}
    assert task.line(row, answer) == {"index": 1, "prediction": prediction}
    assert set(task.load("train", folder)["answer"]) == set(task.labels or ("5.000", "0.000", "3.800", "2.222"))


def test_glue_takes_the_folder_of_one_task(tmp_path):
    task, folder = folder_of("glue_rte", tmp_path)
    assert task.load("test", folder / "RTE")[:] == task.load("test", folder)[:]


def test_torn_rows_of_qqp_are_left_out_and_counted(tmp_path):
    task, folder = folder_of("glue_qqp", tmp_path)
    rows = task.load("train", folder)
    assert len(rows) == NUM_TRAIN
    assert rows[10] == {"id": "12", "text": pair(10)[0], "text_pair": pair(10)[1], "answer": "not_duplicate"}


@pytest.mark.parametrize("name", TASKS)
def test_glue_is_scored(name, tmp_path):
    task, folder = folder_of(name, tmp_path)
    rows = list(task.load("test", folder))
    assert task.metric([row["answer"] for row in rows], rows).value == pytest.approx(1)


# --- GLUE's halves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "num_dev"), [(13, 6), (277, 138), (5000, 2500), (5001, 1000), (40430, 1000)])
def test_halves_are_those_of_pyreft(num_rows, num_dev):
    halves = glue.halves(num_rows)
    assert len(halves["dev"]) == num_dev
    assert sorted(halves["dev"] + halves["test"]) == list(range(num_rows))
    torch.manual_seed(42)
    test, dev = torch.utils.data.random_split(range(num_rows), [num_rows - num_dev, num_dev])
    assert (sorted(test.indices), sorted(dev.indices)) == (halves["test"], halves["dev"])


@pytest.mark.parametrize("name", TASKS)
def test_dev_and_test_are_the_official_dev_set(name, tmp_path):
    task, folder = folder_of(name, tmp_path)
    rows = [*task.load("dev", folder), *task.load("test", folder)]
    assert sorted(int(row["id"]) for row in rows) == list(range(NUM_DEV))
    column = "text_pair" if name == "glue_qnli" else "text"
    expected = {scene(100 + number) for number in range(NUM_DEV)}
    assert {row[column].strip('"') for row in rows} == expected


LABELS = {
    "glue_mnli": ("entailment", "neutral", "contradiction"),
    "glue_sst2": ("negative", "positive"),
    "glue_mrpc": ("not_equivalent", "equivalent"),
    "glue_cola": ("unacceptable", "acceptable"),
    "glue_qnli": ("entailment", "not_entailment"),
    "glue_qqp": ("not_duplicate", "duplicate"),
    "glue_rte": ("entailment", "not_entailment"),
    "glue_stsb": (),
}
HUB_TEXTS = {
    "glue_mnli": ("premise", "hypothesis"),
    "glue_sst2": ("sentence",),
    "glue_mrpc": ("sentence1", "sentence2"),
    "glue_cola": ("sentence",),
    "glue_qnli": ("question", "sentence"),
    "glue_qqp": ("question1", "question2"),
    "glue_rte": ("sentence1", "sentence2"),
    "glue_stsb": ("sentence1", "sentence2"),
}


def as_on_the_hub(name, rows):
    """The same rows with the hub's columns: labels are numbers, scores float32."""
    labels, made = LABELS[name], []
    for row in rows:
        label = labels.index(row["answer"]) if labels else torch.tensor(float(row["answer"])).item()
        texts = zip(HUB_TEXTS[name], (row["text"], row["text_pair"]), strict=False)
        made.append({**dict(texts), "label": label, "idx": int(row["id"])})
    return datasets.Dataset.from_list(made)


@pytest.mark.parametrize("name", TASKS)
def test_the_hubs_rows_are_the_files(name, tmp_path, monkeypatch):
    task, folder = folder_of(name, tmp_path)
    parts = {part: list(task.load(part, folder)) for part in ("train", "dev", "test")}
    official = {
        "train": as_on_the_hub(name, parts["train"]),
        "validation": as_on_the_hub(name, sorted(parts["dev"] + parts["test"], key=lambda row: int(row["id"]))),
    }
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return official[split.removesuffix("_matched")]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for part, rows in parts.items():
        task.refuse_missing(part)
        assert list(texts_of(task.load(part))) == rows
    official_name = "validation_matched" if name == "glue_mnli" else "validation"
    assert task.labels == LABELS[name]
    config = name.removeprefix("glue_")
    assert asked == [("nyu-mll/glue", config, split) for split in ("train", official_name, official_name)]


def test_the_hubs_rows_without_labels_are_refused():
    row = {"sentence1": "a", "sentence2": "b", "label": -1, "idx": 4}
    for name in ("glue_rte", "glue_stsb"):
        with pytest.raises(ValueError, match=rf"the hub's {name[5:]}, row 4: the (label|score) -1"):
            TASKS[name].hub.row(row)


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_TABLES = {
    "few cells": ("glue_rte", "5\tthere\tis", r"train.tsv, line 6: has 3 cells where \['index', .* are expected"),
    "many cells": ("glue_qqp", "\t".join("1234567"), r"train.tsv, line 6: has 7 cells where \['id', .* are expected"),
    "unknown name": ("glue_rte", "5\ta\tb\tmaybe", r"train.tsv, line 6: 'label' \(='maybe'\) must be one of \['entail"),
    "unknown code": ("glue_sst2", "a\t2", r"train.tsv, line 6: 'label' \(='2'\) must be one of \['0', '1'\]"),
    "empty label": ("glue_sst2", "a\t", r"train.tsv, line 6: 'label' \(=''\) must be one of \['0', '1'\]"),
    "no header": ("glue_cola", "gj04\t2\t\ta", r"train.tsv, line 6: 'label' \(='2'\) must be one of \['0', '1'\]"),
    "high score": ("glue_stsb", "\t".join("5------ab6"), r"train.tsv, line 6: the score '6' must be a number from 0"),
    "no score": (
        "glue_stsb",
        "\t".join("5------abc"),
        r"train.tsv, line 6: the score 'c' must be a number from 0",
    ),
    "nan": ("glue_stsb", "\t".join([*"5------ab", "nan"]), r"train.tsv, line 6: the score 'nan' must be a number"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_line_is_named(name, tmp_path):
    task_name, line, message = BAD_TABLES[name]
    task, folder = folder_of(task_name, tmp_path)
    (file,) = task.files(folder, "train")
    lines = file.read_text(encoding="utf-8").split("\n")
    file.write_text("\n".join([*lines[:5], line, *lines[6:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        task.load("train", folder)
    assert str(caught.value).startswith(str(file))


def test_a_table_of_another_task_is_refused(tmp_path):
    official_text.rte(tmp_path)
    with pytest.raises(ValueError, match=r"train.tsv, line 2: has no 'question', only \['index', 'label', 'sentence1'"):
        TASKS["glue_qnli"].load("train", tmp_path / "RTE")


def test_a_table_that_is_not_text_is_named(tmp_path):
    task, folder = folder_of("glue_rte", tmp_path)
    (folder / "RTE" / "train.tsv").write_bytes(b"index\tsentence1\n\xff\xfe")
    with pytest.raises(ValueError, match=r"train.tsv: cannot be read \(.*in UTF-8"):
        task.load("train", folder)
