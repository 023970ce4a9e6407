"""Measures the memory that data take: peaks of processes that read 1,000, 10,000 and 100,000 questions.

    python -m tasks.memory

Each size is a process of its own. It makes the folder, reads it into the cache, cuts dev, hashes the parts, and makes
some batches of rows from all over the data; what the imports take is told apart.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_PICTURES = 64
NUM_BATCHES = 50


def make_folder(folder: Path, num_rows: int) -> None:
    """Write questions, annotations and pictures, row by row."""
    from PIL import Image

    (folder / "images" / "train").mkdir(parents=True)
    for number in range(NUM_PICTURES):
        Image.new("RGB", (64, 64), (number, 80, 120)).save(folder / "images" / "train" / f"{number:012d}.png")
    with (
        (folder / "train_questions.json").open("w") as questions,
        (folder / "train_annotations.json").open("w") as notes,
    ):
        questions.write('{"questions": [')
        notes.write('{"annotations": [')
        for number in range(num_rows):
            image, comma = {"question_id": number, "image_id": number % NUM_PICTURES}, "," if number else ""
            answers = [{"answer": f"red {number % 7}", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
            questions.write(comma + json.dumps({**image, "question": f"what is the color of circle {number} ?"}))
            notes.write(comma + json.dumps({**image, "multiple_choice_answer": "red", "answers": answers}))
        questions.write("]}")
        notes.write("]}")


def measure(num_rows: int) -> dict[str, float]:
    """Return the peak of this process in MB: after the imports, and after all that a run does to its data."""
    from transformers import AutoProcessor

    import vlreft
    from tasks.splits import cut_dev, describe_part, refuse_shared
    from tasks.vqav2 import TASK

    assets = Path(__file__).resolve().parent.parent / "assets"
    collator = vlreft.Collator(AutoProcessor.from_pretrained(assets / "demo-llava"))
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name), num_rows)
        before = _peak()
        rows = TASK.load("train", Path(name))
        loaded = _peak()
        train, dev = cut_dev(rows, TASK.parts, num_rows // 10, seed=0)
        refuse_shared(train, dev)
        describe_part(train)
        rng = random.Random(0)
        for _ in range(NUM_BATCHES):
            collator([train[rng.randrange(len(train))] for _ in range(16)])
        return {"rows": num_rows, "imports": before, "loaded": loaded, "all": _peak()}


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> None:
    """Measure each size in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    print(f"{'rows':>9}{'after imports':>15}{'after loading':>15}{'at the end':>12}   (peak, MB)")
    for num_rows in args.rows:
        command = [sys.executable, "-m", "tasks.memory", "--one", str(num_rows)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        print(f"{num_rows:>9,}{found['imports']:>15.0f}{found['loaded']:>15.0f}{found['all']:>12.0f}")


if __name__ == "__main__":
    main()
