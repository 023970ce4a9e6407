"""Small data sets in the official form of each task with texts alone, in the demo world's words where there can be."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star")
CODES = ("zib", "dax", "wug", "fep", "blick", "toma")
NUM_TRAIN = 24
NUM_TEST = 6
NUM_DEV = 13  # of GLUE's official dev files: halves of 6 and 7
CHOICES = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
GLUE_COLUMNS = {
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label",
    "mnli_dev": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2 label1 label2 label3 label4 label5 gold_label",
    "sst2": "sentence label",
    "qnli": "index question sentence label",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "rte": "index sentence1 sentence2 label",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
}


def thing(number: int) -> tuple[str, str]:
    """Return the colour and shape of a numbered object; 24 numbers have 24 objects."""
    return COLORS[number % 6], SHAPES[number // 6 % 4]


def scene(number: int) -> str:
    """Tell a numbered scene of two objects: 576 numbers have 576 scenes."""
    (color, shape), (other_color, other_shape) = thing(number), thing(number // 24 + number + 1)
    return f"there is a small {color} {shape} , a large {other_color} {other_shape} ."


def code(number: int) -> str:
    """Return the made-up word for the first object's colour."""
    return CODES[number % 6]


def write_json(path: Path, content: Any) -> None:
    """Save JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_table(path: Path, rows: Iterable[Sequence[str]], mark: str = "") -> None:
    """Save cells with tabs between them and nothing quoted, as GLUE does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as out:
        out.write(mark)
        csv.writer(out, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n").writerows(rows)


# LLM-Adapters and Alpaca ----------------------------------------------------------------------------------------------


def commonsense_row(number: int, choices: Sequence[str]) -> dict[str, str]:
    """Return one question with its choices."""
    label = choices[number % len(choices)]
    question = f"{scene(number)} which is it ?\n\nAnswer format: {'/'.join(choices)}"
    return {"instruction": question, "input": "", "output": f"the correct answer is {label}", "answer": label}


def commonsense(folder: Path) -> None:
    """Write the training file, whose rows are of all eight sorts, and the eight test sets."""
    sorts = list(CHOICES.values())
    rows = [commonsense_row(number, sorts[number % 8]) for number in range(NUM_TRAIN)]
    write_json(folder / "ft-training_set" / "commonsense_170k.json", rows)
    for place, (name, choices) in enumerate(CHOICES.items(), 1):
        rows = [commonsense_row(number + 24 * place, choices) for number in range(NUM_TEST)]
        write_json(folder / "dataset" / name / "test.json", rows)


def arithmetic_row(number: int, *, with_letter: bool) -> dict[str, str]:
    """Return one question with a worked solution, that ends in a letter or a number."""
    label = "ABCDE"[number % 5] if with_letter else f"{number % 7}.0"
    shown = label.removesuffix(".0")
    question = f"{scene(number)} how many of them are {thing(number)[0]} ?"
    return {
        "instruction": question,
        "input": "",
        "output": f"count the objects . the answer is {shown}",
        "answer": label,
    }


def arithmetic(folder: Path) -> None:
    """Write the training file, a third of it with letters, and the four test sets; MAWPS's has no solutions."""
    rows = [arithmetic_row(number, with_letter=number % 3 == 0) for number in range(NUM_TRAIN)]
    write_json(folder / "ft-training_set" / "math_10k.json", rows)
    for place, name in enumerate(("AQuA", "gsm8k", "mawps", "SVAMP"), 1):
        rows = [arithmetic_row(number + 24 * place, with_letter=name == "AQuA") for number in range(NUM_TEST)]
        rows = [row | {"output": ""} for row in rows] if name == "mawps" else rows
        write_json(folder / "dataset" / name / "test.json", rows)


def instruct(folder: Path) -> None:
    """Write Alpaca's file, each third row with an input, and alpaca_eval's."""
    rows = [
        {"instruction": f"{scene(number)} tell the hue in code", "input": "", "output": code(number)}
        for number in range(NUM_TRAIN)
    ]
    for number in range(0, NUM_TRAIN, 3):
        rows[number] |= {"instruction": "tell the hue in code", "input": scene(number)}
    write_json(folder / "alpaca_data.json", rows)
    tests = [
        {
            "instruction": f"{scene(number + 24)} tell the hue in code",
            "output": code(number),
            "generator": "text_davinci_003",
            "dataset": "helpful_base",
            "datasplit": "eval",
        }
        for number in range(NUM_TEST)
    ]
    write_json(folder / "alpaca_eval.json", tests)


# GLUE -----------------------------------------------------------------------------------------------------------------


def pair(number: int) -> tuple[str, str]:
    """Return a scene and a claim about it, with quotes of the kinds that are none to GLUE."""
    color, shape = thing(number)
    return f'"{scene(number)}', f"the {shape} isn't {color} ." if number % 2 else f'the {shape} is "{color}" .'


def texts(number: int, *cells: str) -> dict[str, str]:
    """Return the cells that tables of pairs may have, and those that are named here as well: column, cell, ..."""
    first, second = pair(number)
    named = {"index": str(number), "id": str(number), "sentence1": first, "sentence2": second, "sentence": first}
    named |= {"question1": first, "question2": second, "question": second}
    return named | dict(zip(cells[::2], cells[1::2], strict=True))


def table(columns: str, rows: Iterable[dict[str, str]]) -> Iterator[list[str]]:
    """Yield the line of names and the rows; cells that nobody needs hold a dash."""
    names = columns.split()
    yield names
    for row in rows:
        yield [row.get(name, "-") for name in names]


def _write_parts(folder: Path, columns: str, label: str, labels: Sequence[str]) -> None:
    for part, first, num in (("train", 0, NUM_TRAIN), ("dev", 100, NUM_DEV)):
        rows = [texts(number, label, labels[number % len(labels)]) for number in range(first, first + num)]
        write_table(folder / f"{part}.tsv", table(columns, rows))


def mnli(folder: Path) -> None:
    """Write MNLI's two tables, which differ in columns."""
    labels = ("entailment", "neutral", "contradiction")
    for part, columns, first, num in (("train", "mnli", 0, NUM_TRAIN), ("dev_matched", "mnli_dev", 100, NUM_DEV)):
        rows = [texts(number, "gold_label", labels[number % 3]) for number in range(first, first + num)]
        write_table(folder / "MNLI" / f"{part}.tsv", table(GLUE_COLUMNS[columns], rows))


def sst2(folder: Path) -> None:
    """Write SST-2's tables."""
    _write_parts(folder / "SST-2", GLUE_COLUMNS["sst2"], "label", ("0", "1"))


def mrpc(folder: Path) -> None:
    """Write MRPC's tables, which begin with a byte order mark and have blanks in the columns' names."""
    for part, first, num in (("train", 0, NUM_TRAIN), ("dev", 100, NUM_DEV)):
        rows = [[str(number % 2), "1", "2", *pair(number)] for number in range(first, first + num)]
        names = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        write_table(folder / "MRPC" / f"{part}.tsv", [names, *rows], mark="\ufeff")


def cola(folder: Path) -> None:
    """Write CoLA's tables, which do not name their columns."""
    for part, first, num in (("train", 0, NUM_TRAIN), ("dev", 100, NUM_DEV)):
        rows = [["gj04", str(n % 2), "" if n % 2 else "*", scene(n)] for n in range(first, first + num)]
        write_table(folder / "CoLA" / f"{part}.tsv", rows)


def qnli(folder: Path) -> None:
    """Write QNLI's tables."""
    _write_parts(folder / "QNLI", GLUE_COLUMNS["qnli"], "label", ("entailment", "not_entailment"))


def qqp(folder: Path) -> None:
    """Write QQP's tables; one row of train is torn in two."""
    _write_parts(folder / "QQP", GLUE_COLUMNS["qqp"], "is_duplicate", ("0", "1"))
    file = folder / "QQP" / "train.tsv"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[11:11] = ["1000\t1\t2\twhat is the", '"\thow many ?\t0']
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rte(folder: Path) -> None:
    """Write RTE's tables."""
    _write_parts(folder / "RTE", GLUE_COLUMNS["rte"], "label", ("entailment", "not_entailment"))


def stsb(folder: Path) -> None:
    """Write STS-B's tables."""
    _write_parts(folder / "STS-B", GLUE_COLUMNS["stsb"], "score", ("5.000", "0.000", "3.800", "2.222"))


GLUE: dict[str, Callable[[Path], None]] = {
    "mnli": mnli, "sst2": sst2, "mrpc": mrpc, "cola": cola, "qnli": qnli, "qqp": qqp, "rte": rte, "stsb": stsb,
}  # fmt: skip
FOLDERS: dict[str, Callable[[Path], None]] = {
    "commonsense": commonsense,
    "arithmetic": arithmetic,
    "instruct": instruct,
    **{f"glue_{name}": write for name, write in GLUE.items()},
}
