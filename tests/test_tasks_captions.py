"""The caption, classification and retrieval tasks: rows of official files by hand, submissions, hub rows, bad files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from official_captions import FOLDERS, captions_of, write
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from tasks import coco, fewshot, flickr30k, nocaps, retrieval
from tasks.karpathy import INSTRUCTION
from tasks.metrics.captions import caption_scores
from tasks.task import Task, without_pictures

TASKS: dict[str, Task] = {
    task.name: task for task in (*coco.TASKS, flickr30k.TASK, nocaps.TASK, *retrieval.TASKS, *fewshot.TASKS)
}
ASSETS = Path(__file__).parent.parent / "assets"
NUM_ROWS = {
    "coco": {"train": 40, "val": 4, "test": 4},
    "captions": {"train": 24, "dev": 4, "test": 4},
    "flickr30k": {"train": 40, "val": 4, "test": 4},
    "nocaps": {"val": 6},
    "coco_retrieval": {"train": 40, "val": 20, "test": 20},
    "flickr30k_retrieval": {"train": 40, "val": 20, "test": 20},
    "fewshot": {"train": 16, "test": 8},
    "fewshot_dev": {"train": 16, "dev": 4, "test": 8},
    "pets": {"train": 16, "test": 8},
}
PARTS = [(name, part) for name, parts in NUM_ROWS.items() for part in parts]


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


def captioned(name: str, image: str | None, texts: list[str]) -> dict[str, Any]:
    assert texts
    return {"id": name, "image": image, "question": INSTRUCTION, "answer": texts[0], "references": texts}


# --- rows ---------------------------------------------------------------------------------------------------------


def test_every_task_has_a_folder():
    assert set(FOLDERS) == set(TASKS) == set(NUM_ROWS)


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_every_part_loads_with_unique_ids_and_pictures_that_are_there(home, name, part):
    rows = load(home, name, part)
    assert len(rows) == NUM_ROWS[name][part]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all((home / name / row["image"]).is_file() for row in rows)


@pytest.mark.parametrize("name", TASKS)
def test_the_parts_are_those_of_the_files_and_no_picture_is_in_two(home, name):
    parts = TASKS[name].parts
    named = {part for part in (parts.train, parts.dev, *parts.tests) if part is not None}
    assert named == set(NUM_ROWS[name])
    pictures = [{(home / name / row["image"]).read_bytes() for row in load(home, name, part)} for part in named]
    assert sum(map(len, pictures)) == len(set().union(*pictures))


def test_coco_trains_on_captions_of_train_and_restval(home):
    rows = load(home, "coco", "train")
    assert rows[0] == {
        "id": "700",
        "image": "train2014/COCO_train2014_000000000100.jpg",
        "question": "Provide a one-sentence caption for the provided image.",
        "answer": "circle red",
        "references": ["circle red"],
    }
    assert [row["id"] for row in rows] == [str(700 + place) for place in range(40)]
    # Pictures 6 and 7 are restval.
    assert rows[35]["image"] == "val2014/COCO_val2014_000000000107.jpg"
    assert rows[36]["answer"] == "white circle"


def test_coco_is_scored_on_pictures_with_all_their_captions(home):
    val, test = load(home, "coco", "val"), load(home, "coco", "test")
    assert [row["id"] for row in val] == ["108", "109", "110", "111"]
    assert val[0] == captioned("108", "val2014/COCO_val2014_000000000108.jpg", captions_of(8, 5))
    assert [row["id"] for row in test] == ["112", "113", "114", "115"]
    assert [len(row["references"]) for row in test] == [6, 5, 5, 5]
    assert test[0]["references"][-1] == "purple is the square"


def test_flickr30k_rows(home):
    assert load(home, "flickr30k", "train")[6] == captioned("706", "flickr30k-images/1000092796.jpg", ["green circle"])
    test = load(home, "flickr30k", "test")
    assert test[1] == captioned("1000092808", "flickr30k-images/1000092808.jpg", captions_of(13, 5))


@pytest.mark.parametrize("folder", ["flickr30k_images", "images", "."])
def test_flickr30k_pictures_may_be_in_other_folders(tmp_path, folder):
    FOLDERS["flickr30k"](tmp_path)
    shutil.copytree(tmp_path / "flickr30k-images", tmp_path / folder, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "flickr30k-images")
    assert next(flickr30k.read(tmp_path, "val"))["image"] == str(tmp_path / folder / "1000092803.jpg")


def test_captions_of_a_picture_are_gathered_from_the_whole_file(home):
    train, dev = load(home, "captions", "train"), load(home, "captions", "dev")
    assert [row["id"] for row in train] == [str(900 + place) for place in range(24)]
    assert train[9] == captioned("909", "images/train/DEMO_train_000000000001.png", ["green circle"])
    assert [row["id"] for row in dev] == ["8", "9", "10", "11"]
    assert dev[2] == captioned("10", "images/dev/DEMO_dev_000000000010.png", captions_of(10, 3))


def test_nocaps_rows_have_domains(home):
    rows = load(home, "nocaps", "val")
    expected = captioned("4", "val/0000000000000004.jpg", captions_of(4, 10))
    assert rows[4] == {**expected, "domain": "near-domain"}
    assert [row["domain"] for row in rows[:3]] == ["in-domain", "near-domain", "out-domain"]
    assert TASKS["nocaps"].parts.train is None
    assert TASKS["nocaps"].parts.train_on in TASKS


@pytest.mark.parametrize("name", ["coco_retrieval", "flickr30k_retrieval"])
def test_retrieval_scores_the_first_five_captions(home, name):
    test = load(home, name, "test")
    assert len({row["image_id"] for row in test}) == 4
    first = [row for row in test if row["image_id"] == test[0]["image_id"]]
    assert [row["text"] for row in first] == captions_of(12, 5)
    assert [row["id"] for row in first] == ["760", "761", "762", "763", "764"]
    # COCO's first test picture has a sixth caption, which takes an id but makes no row.
    assert test[5]["id"] == ("766" if name == "coco_retrieval" else "765")
    assert load(home, name, "train")[39]["text"] == "there is a white circle"


def test_retrieval_trains_on_every_caption(tmp_path):
    FOLDERS["coco"](tmp_path)
    edit(tmp_path / "dataset_coco.json", lambda data: data["images"][12].update(split="train"))
    assert sum(row["image_id"] == "112" for row in retrieval.read_coco(tmp_path, "train")) == 6


@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_classes_are_read_as_torchvision_reads_them(home, part):
    folder = home / "fewshot_dev" / part
    theirs = ImageFolder(str(folder))
    rows = load(home, "fewshot_dev", part)
    names = [name.replace("_", " ") for name in theirs.classes]
    assert [(str(home / "fewshot_dev" / row["image"]), row["answer"]) for row in rows] == [
        (path, names[label]) for path, label in theirs.samples
    ]
    first = {"train": "00", "dev": "04", "test": "05"}[part]
    assert rows[0]["id"] == f"{part}/blue_triangle/{first}.png"
    assert rows[0]["answer"] == "blue triangle"


def test_pictures_in_deeper_folders_are_read_in_torchvisions_order(tmp_path):
    FOLDERS["fewshot"](tmp_path)
    place = tmp_path / "test" / "red_circle"
    for name in ("b/9.PNG", "a/x/1.tiff", "a/0.jpeg", "Z.webp", "notes.txt"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(place / "05.png", place / name)
    theirs = [path for path, label in ImageFolder(str(tmp_path / "test")).samples if label == 2]
    ours = [row["image"] for row in fewshot.read_folder(tmp_path, "test") if row["answer"] == "red circle"]
    assert set(ours) == set(theirs)
    assert len(ours) == 6
    assert ours == sorted(ours, key=lambda path: (str(Path(path).parent), path))


def test_suffixes_are_torchvisions():
    assert sorted(fewshot.SUFFIXES) == sorted(IMG_EXTENSIONS)


def test_a_changed_class_folder_is_read_anew(tmp_path):
    FOLDERS["fewshot"](tmp_path)
    before = len(TASKS["fewshot"].load("test", tmp_path))
    shutil.copy(tmp_path / "test/red_circle/05.png", tmp_path / "test/red_circle/99.png")
    assert len(TASKS["fewshot"].load("test", tmp_path)) == before + 1


def test_pets_rows(home):
    rows = load(home, "pets", "test")
    assert rows[1] == {"id": "red_circle_6", "image": "images/red_circle_6.jpg", "answer": "Red Circle"}
    assert [row["id"] for row in load(home, "pets", "train")][3:5] == ["red_circle_4", "green_square_1"]
    assert TASKS["pets"].templates == ("a photo of a {}, a type of pet.",)


def test_the_demo_data_are_folders_of_these_tasks():
    for part, num, picture in (("train", 520, 24), ("dev", 158, 8), ("test", 407, 20)):
        assert len(TASKS["captions"].load(part, ASSETS / "demo-vqa" / "short")) == num
        assert len(TASKS["fewshot_dev"].load(part, ASSETS / "demo-clip-data" / "lines")) == picture * 32


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_training_rows_come_before_the_file_is_read_to_its_end(tmp_path, name):
    FOLDERS[name](tmp_path)
    file = tmp_path / f"dataset_{name}.json"
    file.write_text(file.read_text()[:-2])
    rows = TASKS[name].read(tmp_path, "train")
    assert next(rows)["id"] == "700"
    with pytest.raises(ValueError, match="is not JSON"):
        list(rows)


# --- submissions and the hub --------------------------------------------------------------------------------------


def test_submissions(home):
    for name, part, expected in (
        ("coco", "test", {"image_id": 112, "caption": "a dog"}),
        ("captions", "test", {"image_id": 12, "caption": "a dog"}),
        ("flickr30k", "test", {"image_id": 1000092807, "caption": "a dog"}),
        ("nocaps", "val", {"image_id": 0, "caption": "a dog"}),
        ("fewshot", "test", {"id": "test/blue_triangle/05.png", "answer": "a dog"}),
        ("pets", "test", {"id": "red_circle_5", "answer": "a dog"}),
    ):
        line = TASKS[name].line(load(home, name, part)[0], "a dog")
        assert line == expected
        assert json.loads(json.dumps(line)) == expected


def test_lines_of_ranked_answers_are_json(home):
    row = load(home, "coco_retrieval", "test")[0]
    line = TASKS["coco_retrieval"].line(row, ["112", "113"])
    assert line == {"id": "760", "image_id": "112", "answer": ["112", "113"]}


HUB = {
    "captions": (
        {
            "question_id": "000000179765.jpg",
            "question": "?",
            "answer": ["a bike ", "one bike"],
            "id": 38,
            "image": None,
        },
        captioned("179765", None, ["a bike", "one bike"]),
    ),
    "flickr30k": (
        {
            "image": None,
            "caption": ["two dogs", "dogs \n"],
            "sentids": ["5", "6"],
            "split": "test",
            "img_id": "1",
            "filename": "1007129816.jpg",
        },
        captioned("1007129816", None, ["two dogs", "dogs"]),
    ),
    "nocaps": (
        {
            "image": None,
            "image_file_name": "0013ea2087020901.jpg",
            "image_id": 7,
            "annotations_ids": [70, 71],
            "annotations_captions": ["a baby", "a child"],
        },
        {**captioned("7", None, ["a baby", "a child"]), "domain": ""},
    ),
    "pets": (
        {"image": None, "label": 0, "image_id": "Egyptian_Mau_31", "label_cat_dog": 0},
        {"id": "Egyptian_Mau_31", "image": None, "answer": "Egyptian Mau"},
    ),
}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.hub is not None])
def test_hub_rows(name, monkeypatch, tmp_path):
    given, expected = HUB[name]
    hub = TASKS[name].hub
    assert hub is not None
    assert hub.row(given) == expected
    # As `load` reads them: pictures stay encoded, and what is read without them is the same.
    FOLDERS["pets"](tmp_path)
    png = str(tmp_path / "images" / "red_circle_1.jpg")
    stored = datasets.Dataset.from_list([{**given, "image": png}]).cast_column("image", datasets.Image())
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: (asked.append((*args, split)), stored)[1])
    for part, split in hub.parts.items():
        rows = TASKS[name].load(part)
        assert asked.pop() == (hub.name, None, split)
        assert {**rows[0], "image": None} == expected
        assert rows[0]["image"]["path"] == png
        assert without_pictures(rows)[0] == expected
        assert set(rows[0]) == set(TASKS[name].features)
    assert set(hub.parts) <= set(NUM_ROWS[name])


def test_parts_that_the_hub_lacks_are_refused():
    with pytest.raises(ValueError, match="no part 'train' on the hub"):
        TASKS["flickr30k"].load("train")
    with pytest.raises(ValueError, match="no part 'test' on the hub"):
        TASKS["coco"].load("test")


# --- metrics ------------------------------------------------------------------------------------------------------


def test_a_domain_of_nocaps_is_scored_as_a_set_of_its_own(home):
    texts = ["a red circle", "a red star", "a blue star", "a small red circle", "a small star", "a large square"]
    rows = [{**row, "references": [text]} for row, text in zip(load(home, "nocaps", "val"), texts, strict=True)]
    answers = ["a red circle and a small blue star"] * 6
    score = TASKS["nocaps"].metric(answers, rows)
    whole = caption_scores(answers, rows)
    assert whole.by_row is not None
    assert score.value == whole.value
    apart = []
    for domain, places in (("in-domain", (0, 3)), ("near-domain", (1, 4)), ("out-domain", (2, 5))):
        alone = caption_scores([answers[place] for place in places], [rows[place] for place in places])
        assert score.parts[f"{domain} {alone.name}"] == alone.value
        apart.append(alone.value - sum(whole.by_row[place] for place in places) / 2)
    assert max(map(abs, apart)) > 1e-3  # their idf is another one
    assert set(whole.parts) < set(score.parts)
    assert "own references" in score.over


def test_nocaps_without_domains_is_scored_as_a_whole(home):
    rows = [{**row, "domain": ""} for row in load(home, "nocaps", "val")]
    answers = [row["answer"] for row in rows]
    assert dict(TASKS["nocaps"].metric(answers, rows).parts) == dict(caption_scores(answers, rows).parts)


# --- bad input ----------------------------------------------------------------------------------------------------


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file's content in place."""
    data = json.loads(file.read_text())
    change(data)
    write(file, data)


BAD_KARPATHY = {
    "no caption": (lambda data: data["images"][2].update(sentences=[]), r"row 2: the picture .* has no caption"),
    "empty caption": (
        lambda data: data["images"][2]["sentences"][1].update(raw=" \n"),
        r"row 2, sentence 1: 'raw' is empty",
    ),
    "same picture twice": (
        lambda data: data["images"].append(data["images"][0]),
        r"row 16: the id \d+ is there a second time",
    ),
    "same caption id twice": (
        lambda data: data["images"][1]["sentences"][3].update(sentid=701),
        r"row 1, sentence 3: the id 701 is there a second time",
    ),
    "no picture": (
        lambda data: data["images"][3].update(filename="COCO_train2014_000000000999.jpg"),
        r"row 3: there is no image '.*999.jpg'",
    ),
    "path leaves": (
        lambda data: data["images"][3].update(filename="../../../COCO_1.jpg"),
        r"row 3: the file name '.*COCO_1.jpg' leaves the folder",
    ),
    "unknown split": (lambda data: data["images"][4].update(split="dev"), r"row 4: 'split' \(='dev'\) must be one of"),
    "no split": (lambda data: data["images"][4].pop("split"), r"row 4: has no 'split'"),
    "no number": (
        lambda data: data["images"][1].update(filename="cat.jpg"),
        r"row 1: the name '.*cat.jpg' does not end",
    ),
    "sentence": (lambda data: data["images"][1]["sentences"].insert(0, "red"), r"row 1, sentence 0: got a str"),
    "no list": (lambda data: data.pop("images"), r"has no list under 'images'"),
}


@pytest.mark.parametrize("case", BAD_KARPATHY)
@pytest.mark.parametrize("name", ["coco", "flickr30k", "coco_retrieval", "flickr30k_retrieval"])
def test_bad_karpathy_files_are_refused(tmp_path, name, case):
    FOLDERS[name](tmp_path)
    change, message = BAD_KARPATHY[case]
    file = f"dataset_{name.removesuffix('_retrieval')}.json"
    edit(tmp_path / file, change)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        TASKS[name].load("train", tmp_path)


BAD_CAPTIONS = {
    "empty caption": (lambda data: data["annotations"][5].update(caption=""), r"annotations row 5: 'caption' is empty"),
    "same caption id twice": (
        lambda data: data["annotations"][2].update(id=data["annotations"][0]["id"]),
        r"annotations row 2: the id \d+ is there a second time",
    ),
    "no caption id": (lambda data: data["annotations"][2].pop("id"), r"annotations row 2: has no 'id'"),
    "same image twice": (
        lambda data: data["images"].append(data["images"][1]),
        r"images row \d+: the id \d+ is there a second time",
    ),
    "an image without captions": (
        lambda data: data.update(annotations=[note for note in data["annotations"] if note["image_id"] % 4 != 1]),
        r"images row 1: the image \d+ has no caption",
    ),
    "path leaves": (
        lambda data: data["images"][2].update(file_name="../../outside.png"),
        r"images row 2: the file name '../../outside.png' leaves the folder",
    ),
    "no picture": (
        lambda data: data["images"][2].update(file_name="missing.png"),
        r"images row 2: there is no image 'missing.png'",
    ),
    "no annotations": (lambda data: data.pop("annotations"), r"has no list under 'annotations'"),
    "text for an id": (lambda data: data["annotations"][2].update(image_id="1"), r"annotations row 2: 'image_id'"),
}


@pytest.mark.parametrize("case", BAD_CAPTIONS)
@pytest.mark.parametrize(
    ("name", "part", "file"),
    [
        ("captions", "train", "train_captions.json"),
        ("captions", "test", "test_captions.json"),
        ("nocaps", "val", "nocaps_val_4500_captions.json"),
    ],
)
def test_bad_caption_files_are_refused(tmp_path, name, part, file, case):
    FOLDERS[name](tmp_path)
    change, message = BAD_CAPTIONS[case]
    edit(tmp_path / file, change)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        TASKS[name].load(part, tmp_path)


@pytest.mark.parametrize(("name", "part"), [("captions", "train"), ("captions", "test"), ("nocaps", "val")])
def test_an_annotation_without_image_is_refused(tmp_path, name, part):
    FOLDERS[name](tmp_path)
    (file,) = TASKS[name].files(tmp_path, part)
    edit(file, lambda data: data["annotations"][7].update(image_id=999))
    with pytest.raises(ValueError, match=rf"{file.name}, annotations row 7: .*999"):
        TASKS[name].load(part, tmp_path)


def test_bad_domains_are_refused(tmp_path):
    FOLDERS["nocaps"](tmp_path)
    file = tmp_path / "nocaps_val_4500_captions.json"
    edit(file, lambda data: data["images"][3].update(domain="far"))
    with pytest.raises(ValueError, match=r"captions.json, images row 3: 'domain' \(='far'\)"):
        nocaps.TASK.load("val", tmp_path)


JSON_TASKS = [name for name in TASKS if name not in ("fewshot", "fewshot_dev", "pets")]


@pytest.mark.parametrize("name", JSON_TASKS)
def test_broken_json_and_missing_files_are_refused(tmp_path, name):
    task, part = TASKS[name], next(iter(NUM_ROWS[name]))
    FOLDERS[name](tmp_path)
    (file,) = task.files(tmp_path, part)
    file.write_text(file.read_text()[:-30])
    with pytest.raises(ValueError, match=rf"{file.name}: is not JSON"):
        task.load(part, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"holds none of|must hold one file"):
        task.load(part, tmp_path)


def test_bad_class_folders_are_refused(tmp_path):
    task = TASKS["fewshot"]

    def refused(message: str, change: Callable[[Path], Any], part: str = "test") -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        FOLDERS["fewshot"](folder)
        change(folder)
        with pytest.raises(ValueError, match=message):
            task.load(part, folder)

    refused(
        r"test/blue_ball: the class 'blue ball' is not in .*train", lambda folder: (folder / "test/blue_ball").mkdir()
    )
    refused(
        r"train/blue_ball: the class holds no picture", lambda folder: (folder / "train/blue_ball").mkdir(), "train"
    )
    refused(r"no folder 'test'", lambda folder: shutil.rmtree(folder / "test"))
    refused(r"its class 'red circle' is that of .*red circle too", lambda folder: (folder / "test/red circle").mkdir())

    def flat(folder: Path) -> None:
        shutil.rmtree(folder / "test")
        shutil.copytree(folder / "train/red_circle", folder / "test")

    refused(r"test holds 0 class folders", flat)


def test_bad_lists_of_pets_are_refused(tmp_path):
    def refused(message: str, lines: str) -> None:
        (tmp_path / "annotations/test.txt").write_text(lines)
        with pytest.raises(ValueError, match=message):
            TASKS["pets"].load("test", tmp_path)

    FOLDERS["pets"](tmp_path)
    refused(r"test.txt, line 2: the id red_circle_1 is there a second time", "red_circle_1 1 1 1\nred_circle_1 1 1 1\n")
    refused(r"test.txt, line 1: there is no image 'red_circle_77.jpg'", "red_circle_77 1 1 1\n")
    refused(r"test.txt, line 1: the file name '../images_2.jpg' leaves the folder", "../images_2 1 1 1\n")
    shutil.copy(tmp_path / "images/red_circle_1.jpg", tmp_path / "images/redcircle.jpg")
    refused(r"test.txt, line 1: the name 'redcircle' must be a breed and a number", "redcircle 1 1 1\n")
    refused(r"holds no rows", "#Image CLASS-ID SPECIES BREED ID\n")
