"""Record what the official scripts make of generated answers: `answers.json.gz`, for tests/test_metrics_answers.py.

    python tests/golden/record_answers.py FOLDER PYTHON2 ANLS

FOLDER has the checked-out repositories VQA (GT-Vision-Lab), LLaVA (haotian-liu), pyreft (stanfordnlp), LLM-Adapters
(AGI-Edgerunners), aokvqa (allenai) and lmms-eval (EvolvingLMMs-Lab). PYTHON2 is an interpreter for vqaEval.py, which is
of that language. ANLS is where `pip install --target ANLS --no-deps anls==0.0.2` has put the package. numpy, torch and
tqdm are needed.

The scripts' own functions run, or the scripts; what they import for running models, and the models, are stand-ins.
"""

import contextlib
import gzip
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

Case = dict[str, Any]

MARKS = ";/[]\"{}()=+\\_-><@`,?!.:'*&$%#~|^"
WORDS = (
    "yes no Yes NO not none zero one two three ten eleven a an the A The red blue dark-blue cat cats man's it's its "
    "café naïve Straße STRASSE ß ½ ٣ ٣.٣ ٣,٣ 3 10 2.5 .5 5. 1,000 1,000.50 -3 10% $5.00 1.000.000 12:30 3-4 50/50 "
    "U.S.A. n/a don't dont DONT wont Im I'm Ive I'dve didnt couldn't've 'twas o'clock t-shirt north. (left) \"stop\" "
    "[x] x,y 🐈 unanswerable main st. no. not, e.g. surfboard"
).split()
GAPS = (" ", " ", " ", " ", "  ", "\n", "\t", ", ", ",", " ,", ". ", "-", " - ", "\u00a0", "")
SETS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}


def phrase(random: Random, words: list[str]) -> str:
    """Make a text of one to three words; one in fifty is empty or has more periods than the scripts replace."""
    if random.random() < 0.02:
        return random.choice(["", " ", "\n", ".", "a", "the a", "a-b-\tc", "x/y\n/z", "x." * 40, "." * 35, "1." * 40])
    text = random.choice(words)
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        text += random.choice(GAPS) + random.choice(words)
    return text


def variant(random: Random, text: str) -> str:
    """Change a text in a way that a normaliser may undo."""
    place, mark = random.randint(0, len(text)), random.choice(MARKS)
    return random.choice(
        [
            text,
            text.upper(),
            text.title(),
            f" {text}",
            f"{text}\n",
            f"{text}.",
            f"the {text}",
            f"{text}\ta",
            text.replace("'", ""),
            text.replace("-", " "),
            text.replace(",", ""),
            text[:place] + mark + text[place:],
            text[:place] + mark + " " + text[place:],
            text[:place] + " " + text[place:],
        ]
    )


def vqa_cases(random: Random, contractions: dict[str, str]) -> list[Case]:
    """Make questions; `which` says for each annotator which of `texts` the answer is."""
    words, cases = [*WORDS, *contractions, *contractions.values()], []
    for text in [*contractions, *(phrase(random, words) for _ in range(2900))]:
        texts = list(dict.fromkeys([text, *(variant(random, text) for _ in range(random.randint(0, 3)))]))
        texts += [phrase(random, words) for _ in range(random.choice((0, 0, 1)))]
        count = 10 if random.random() < 0.75 else random.randint(1, 12)
        which = "".join(str(random.randrange(len(texts)) if random.random() < 0.6 else 0) for _ in range(count))
        answer = random.choice([text, variant(random, text), random.choice(texts), phrase(random, words)])
        cases.append({"answer": answer, "texts": texts, "which": which})
    return cases


def text_cases(random: Random) -> list[Case]:
    """Make answers beside one text: for GQA, exact match."""
    cases = []
    for _ in range(2200):
        text = phrase(random, WORDS).strip()
        text = random.choice([text, text.lower(), text.lower().rstrip(".")])
        cases.append({"answer": random.choice([text, text + ".", text + "...", variant(random, text)]), "text": text})
    return cases


def science_cases(random: Random) -> list[Case]:
    """Make answers to ScienceQA's questions."""
    forms = ["{}", "{}.", "{}.x", "{}:", "({})", "{}. ", "{}. red", " {}. red", "{}.  red", "{} ", "{}\n", ""]
    forms += ["The answer is {}.", "So. The answer is {}.\nBECAUSE: no", "The answer is {}", "The answer is {},"]
    forms += ["The answer is {}. The answer is {}.", "the answer is {}.", "The answer is {}\n", "The answer is  {}."]
    forms += ["The answer is A or {}. The answer is {}.", "The answer is {}x", "The answer is {}. red", "answer {}"]
    cases = []
    for _ in range(2400):
        letter = random.choice("AABBCCDDEEFGZa1é")
        answer = random.choice(forms).replace("{}", letter)
        gold = letter if letter in "ABCDE" and random.random() < 0.7 else random.choice("ABCDE")
        num_choices = random.randint("ABCDE".index(gold) + 1, 5) if random.random() < 0.8 else random.randint(2, 5)
        num_choices = max(num_choices, "ABCDE".index(gold) + 1)
        cases.append({"answer": answer, "gold": gold, "num": num_choices, "image": random.random() < 0.5})
    return cases


def pope_cases(random: Random) -> list[Case]:
    """Make answers to POPE's questions."""
    words = "yes no Yes No NO not Not none nothing there is a dog, cat no, No, no. Yes, not, n't isn't No! -no".split()
    words += ["no\n", "\tno", "", "\u00a0no"]
    cases = []
    for _ in range(2500):
        answer = " ".join(random.choice(words) for _ in range(random.choice((0, 1, 1, 1, 2, 4, 6))))
        cases.append({"answer": answer, "gold": random.choice(("yes", "no"))})
    return cases


def anls_cases(random: Random) -> list[Case]:
    """Make answers and their references, at all distances, many of them just 0.5."""
    cases = []
    for _ in range(2400):
        texts = [phrase(random, WORDS) for _ in range(random.randint(1, 3))]
        text = random.choice(texts)
        if random.random() < 0.25:
            text = "".join(random.choice("abcd") for _ in range(random.choice((2, 4, 6, 8))))
            texts[0] = "".join(random.choice("abcd") if random.random() < 0.6 else letter for letter in text)
        for _ in range(random.choice((0, 1, 1, 2, 4))):
            text = variant(random, text)
        cases.append({"answer": text, "texts": texts})
    return cases


def aokvqa_cases(random: Random) -> list[Case]:
    """Make answers to A-OKVQA's questions."""
    cases = []
    for _ in range(2200):
        texts = [phrase(random, WORDS) for _ in range(3)]
        texts += [variant(random, texts[0])]
        which = "".join(random.choice("00123") for _ in range(10))
        choices = random.sample([*texts, "red", "blue"], 4)
        answer = random.choice([*texts, *choices, variant(random, texts[0])])
        difficult = random.random() < 0.1
        cases.append({"answer": answer, "texts": texts, "which": which, "choices": choices, "difficult": difficult})
        cases[-1]["correct"] = random.randrange(4)
    return cases


def commonsense_cases(random: Random, trigger: str) -> list[Case]:
    """Make answers to the eight commonsense sets."""
    forms = ["{}", " {}", "{}\n", "{}.", "{} {other}", "{other} {}", "un{}", "{}0", "the {}", "", "neither", "{upper}"]
    cases = []
    for _ in range(4000):
        subset = random.choice([*SETS])
        gold, other = (random.choice(SETS[subset]) for _ in range(2))
        text = random.choice(forms[:4] * 2 + forms).replace("{other}", other).replace("{upper}", gold.title())
        text = text.replace("{}", random.choice((gold, gold, gold, other, "answer5", "true")))
        starts = [trigger, trigger, trigger, "", trigger.strip(), trigger.title(), "So " + trigger, trigger * 2]
        start = random.choice(starts)
        cases.append({"answer": start + text, "gold": gold, "subset": subset})
    return cases


def number(random: Random) -> str:
    """Make a number, as a model may write it."""
    value = random.choice([random.randint(-20, 20), random.randint(0, 3000000), round(random.uniform(-99, 99), 3)])
    forms = "{} {} {} {:,} {:,} ${} {}% {}. {:.2f} {:,.2f} +{} -{} {}/4 {}th {}e3 ({}) ٣{} {}.٣".split()
    return random.choice(forms).format(value)


def arithmetic_cases(random: Random) -> list[Case]:
    """Make answers to the arithmetic sets; a number's gold is often the answer's, within or beyond the tolerance."""
    cases = []
    for _ in range(3200):
        subset = random.choice(["AQuA", "gsm8k", "mawps", "SVAMP", "AddSub", "MultiArith", "SingleEq"])
        words = [random.choice(["is", "The", "Answer:", "so", "=", "-", ".", "C", "D)", "(E)", "b", number(random)])]
        more = ["=", "and", "B", "-", ",", "apples."]
        words += [random.choice([number(random), *more]) for _ in range(random.randint(0, 5))]
        answer = random.choice([" ", " ", ""]).join(words) if random.random() > 0.02 else ""
        found = re.findall(r"[0-9]+(?:\.[0-9]+)?", answer.replace(",", ""))
        near = float(found[-1] if found else 7) * random.choice((1, 1, 1, -1))
        near = round(near + random.choice((0, 0, 0.0009, 0.002, 1)), 4)
        gold = random.choice("ABCDE") if subset == "AQuA" else f"{near:g}" if random.random() < 0.3 else str(near)
        cases.append({"answer": answer, "gold": gold, "subset": subset})
    return cases


def load(path: Path, *stand_ins: str) -> ModuleType:
    """Import a script without its assertions; what it imports by these names is a stand-in."""
    module = ModuleType(path.stem)
    before = {name: sys.modules.get(name) for name in stand_ins}
    for name in stand_ins:
        sys.modules[name] = MagicMock()
        sys.modules[name].register_metric = sys.modules[name].register_aggregation = lambda *_, **__: lambda it: it
    try:
        exec(compile(path.read_text(), str(path), "exec", optimize=1), module.__dict__)
    finally:
        for name, old in before.items():
            sys.modules.pop(name)
            sys.modules.update({name: old} if old else {})
    return module


@contextlib.contextmanager
def in_folder() -> Iterator[Path]:
    """Work in a temporary folder, with what is printed thrown away."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield Path(folder)
        finally:
            os.chdir(before)


PYTHON_2 = """
import json, sys
sys.path.insert(0, sys.argv[1])
from vqaEval import VQAEval

class Table:
    def __init__(self, qa):
        self.qa = qa
    def getQuesIds(self):
        return sorted(self.qa)

cases = json.load(open("cases.json"))
truth, said = {}, {}
for number, case in enumerate(cases):
    texts = [case["texts"][int(place)] for place in case["which"]]
    answers = [{"answer": text, "answer_id": place} for place, text in enumerate(texts)]
    truth[number] = {"answers": answers, "question_type": "what", "answer_type": "other"}
    said[number] = {"answer": case["answer"]}
judge = VQAEval(Table(truth), Table(said), n=13)
judge.evaluate()
scores = [judge.evalQA[number] / 100 for number in range(len(cases))]
forms = [case["answer"].replace("\\n", " ").replace("\\t", " ").strip() for case in cases]
forms = [judge.processDigitArticle(judge.processPunctuation(form)) for form in forms]
json.dump({"scores": scores, "forms": forms, "overall": judge.accuracy["overall"]}, open("out.json", "w"))
"""


def run_vqav2(folder: Path, python2: str, cases: list[Case]) -> dict[str, Any]:
    """Run vqaEval.py; its `n`, the digits it rounds percentages to, is raised from 2 to 13."""
    with in_folder() as work:
        (work / "cases.json").write_text(json.dumps(cases))
        (work / "run.py").write_text(PYTHON_2)
        place = folder / "VQA" / "PythonEvaluationTools" / "vqaEvaluation"
        subprocess.run([python2, "run.py", place], check=True, stdout=subprocess.DEVNULL)
        return json.loads((work / "out.json").read_text())


def run_evalai(script: ModuleType, cases: list[Case]) -> dict[str, Any]:
    """Run m4c_evaluator.py; without its assertion it takes other than ten references, too."""
    judge = script.TextVQAAccuracyEvaluator()
    entries = [{"pred_answer": c["answer"], "gt_answers": [c["texts"][int(i)] for i in c["which"]]} for c in cases]
    with in_folder():
        scores = [judge.eval_pred_list([entry]) for entry in entries]
    return {"scores": scores, "forms": [judge.answer_processor(case["answer"]) for case in cases]}


def run_gqa(folder: Path, cases: list[Case]) -> list[bool]:
    """Run convert_gqa_for_eval.py, then the comparison of GQA's eval.py, which is `==`."""
    with in_folder() as work:
        lines = [json.dumps({"question_id": place, "text": case["answer"]}) for place, case in enumerate(cases)]
        (work / "src").write_text("\n".join(lines))
        script = folder / "LLaVA" / "scripts" / "convert_gqa_for_eval.py"
        subprocess.run([sys.executable, script, "--src", "src", "--dst", "dst"], check=True)
        said = json.loads((work / "dst").read_text())
    return [entry["prediction"] == case["text"] for entry, case in zip(said, cases, strict=True)]


def run_scienceqa(folder: Path, cases: list[Case]) -> dict[str, Any]:
    """Run eval_science_qa.py as a script."""
    problems, said = {}, []
    for place, case in enumerate(cases):
        problems[str(place)] = {"answer": "ABCDE".index(case["gold"]), "choices": ["x"] * case["num"]}
        prompt = "<image>\nq" if case["image"] else "q"
        said.append(json.dumps({"question_id": str(place), "text": case["answer"], "prompt": prompt}))
    with in_folder() as work:
        (work / "problems.json").write_text(json.dumps(problems))
        (work / "pid_splits.json").write_text(json.dumps({"test": [*problems]}))
        (work / "said").write_text("\n".join(said))
        command = [sys.executable, folder / "LLaVA" / "llava" / "eval" / "eval_science_qa.py", "--base-dir", "."]
        command += ["--result-file", "said", "--output-file", "out", "--output-result", "result"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        right = {int(entry["question_id"]) for entry in json.loads((work / "out").read_text())["correct"]}
    return {"right": [place in right for place in range(len(cases))], "percent": re.findall(r"([\d.]+)%", printed)}


def run_pope(script: ModuleType, cases: list[Case]) -> dict[str, Any]:
    """Run eval_pope.py's function over fifty cases at a time."""
    is_yes, groups = [], []
    for start in range(0, len(cases), 50):
        some = cases[start : start + 50]
        answers, printed = [{"text": case["answer"]} for case in some], io.StringIO()
        with in_folder() as work, contextlib.redirect_stdout(printed):
            (work / "labels").write_text("\n".join(json.dumps({"label": case["gold"]}) for case in some))
            script.eval_pope(answers, "labels")
        is_yes += [answer["text"] == "yes" for answer in answers]
        groups.append([float(found) for found in re.findall(r": ([\d.]+)", printed.getvalue())])
    return {"is_yes": is_yes, "groups": groups}  # a group's figures: accuracy, precision, recall, F1, yes ratio


def run_anls(script: ModuleType, package: Path, cases: list[Case]) -> dict[str, Any]:
    """Run lmms-eval's function, which is the challenges' script, and the package's, which is the papers' formula."""
    sys.path.insert(0, str(package))
    anls = importlib.import_module("anls")
    scores = [script.anls(case["texts"], [case["answer"]])["anls"] for case in cases]
    return {"scores": scores, "strict": [anls.anls_score(case["answer"], case["texts"]) for case in cases]}


def run_aokvqa(script: ModuleType, cases: list[Case]) -> dict[str, Any]:
    """Run eval_predictions.py's function: over all cases, and direct answers case by case."""
    data, said = [], {}
    for place, case in enumerate(cases):
        texts = [case["texts"][int(which)] for which in case["which"]]
        entry = {"question_id": str(place), "direct_answers": texts, "choices": case["choices"]}
        data.append(entry | {"correct_choice_idx": case["correct"], "difficult_direct_answer": case["difficult"]})
        said[str(place)] = case["answer"]
    direct = [script.eval_aokvqa([entry | {"difficult_direct_answer": False}], said, strict=False) for entry in data]
    overall = [script.eval_aokvqa(data, said, multiple_choice=is_choice, strict=False) for is_choice in (False, True)]
    return {"direct": [score / 100 for score in direct], "overall": overall}


def run_adapters(folder: Path, name: str, cases: list[Case]) -> list[bool]:
    """Run LLM-Adapters' `main` with a model that says the cases' answers, eighty cases of a set at a time."""
    script = load(folder / "LLM-Adapters" / name, "fire", "peft", "transformers")
    right = [False] * len(cases)
    for subset in dict.fromkeys(case["subset"] for case in cases):
        places = [place for place, case in enumerate(cases) if case["subset"] == subset]
        for start in range(0, len(places), 80):
            some = [cases[place] for place in places[start : start + 80]]
            said = ["### Response:" + case["answer"] for case in some]
            tokenizer = MagicMock()
            tokenizer.batch_decode.return_value, tokenizer.decode.side_effect = said, said
            data = [{"instruction": "", "answer": case["gold"]} for case in some]
            args = Namespace(dataset=subset, model="m", adapter="a", batch_size=len(some))
            script.load_data, script.parse_args = lambda _, data=data: data, lambda args=args: args
            script.load_model = lambda _, tokenizer=tokenizer: (tokenizer, MagicMock())
            with in_folder() as work:
                script.main()
                flags = json.loads((work / "experiment" / f"m-a-{subset}.json").read_text())
            for place, entry in zip(places[start : start + 80], flags, strict=True):
                right[place] = entry["flag"]
    return right


def run_pyreft(folder: Path, task: str, cases: list[Case]) -> list[bool]:
    """Run pyreft's `compute_metrics` with a model that says one case's answer, case by case."""
    import torch

    place = folder / "pyreft" / "examples" / "loreft"
    sys.path.insert(0, str(place))
    names = ("pyvene", "pyreft", "evaluate", "transformers", "transformers.utils", "transformers.trainer_utils")
    script, right = load(place / "compute_metrics.py", *names), []
    settings = importlib.import_module("task_config").task_config[task]
    keys = ("id", "intervention_locations", "input_ids", "attention_mask")
    batch = {key: torch.zeros(1, dtype=torch.long) for key in keys}
    for case in cases:
        tokenizer, model, item = MagicMock(), MagicMock(), {"instruction": "q", "answer": case["gold"]}
        tokenizer.name_or_path, model.generate.return_value = "llama", (None, None)
        tokenizer.batch_decode.return_value = [settings["task_prompt_template"] % "Is it?" + case["answer"]]
        with in_folder():
            _, report = script.compute_metrics(
                task,
                "set",
                model,
                tokenizer,
                [0],
                [item],
                settings["trigger_tokens"],
                "run",
                data_collator=lambda _: dict(batch),
                greedy_decoding=True,
            )
        right.append(report["eval/set"] == 1)
    return right


def record(folder: Path, python2: str, package: Path) -> dict[str, Any]:
    """Make the cases, from fixed seeds, and what the scripts say to them."""
    evaluation = folder / "LLaVA" / "llava" / "eval"
    m4c = load(evaluation / "m4c_evaluator.py")
    vqa = vqa_cases(Random(0), m4c.EvalAIAnswerProcessor.CONTRACTIONS)
    texts, science, pope, distances = (
        make(Random(seed)) for seed, make in enumerate((text_cases, science_cases, pope_cases, anls_cases), 1)
    )
    aokvqa, arithmetic = aokvqa_cases(Random(5)), arithmetic_cases(Random(6))
    commonsense = commonsense_cases(Random(7), "the correct answer is ")
    stand_ins = ("sacrebleu", "lmms_eval", "lmms_eval.api", "lmms_eval.api.registry")
    metrics = folder / "lmms-eval" / "lmms_eval" / "api" / "metrics.py"
    lmms = load(metrics, *stand_ins)
    choice = load(folder / "aokvqa" / "evaluation" / "eval_predictions.py", "load_aokvqa")
    adapters = [case for case in arithmetic if case["subset"] != "mawps"]  # which evaluate.py refuses
    return {
        "vqa": {"cases": vqa, "vqav2": run_vqav2(folder, python2, vqa), "evalai": run_evalai(m4c, vqa)},
        "gqa": {"cases": texts, "right": run_gqa(folder, texts)},
        "scienceqa": {"cases": science, **run_scienceqa(folder, science)},
        "pope": {"cases": pope, **run_pope(load(evaluation / "eval_pope.py"), pope)},
        "anls": {"cases": distances, **run_anls(lmms, package, distances)},
        "aokvqa": {"cases": aokvqa, **run_aokvqa(choice, aokvqa)},
        "commonsense": {
            "cases": commonsense,
            "pyreft": run_pyreft(folder, "commonsense", commonsense),
            "llm-adapters": run_adapters(folder, "commonsense_evaluate.py", commonsense),
        },
        "arithmetic": {
            "cases": arithmetic,
            "pyreft": run_pyreft(folder, "math", arithmetic),
            "llm-adapters": run_adapters(folder, "evaluate.py", adapters),
        },
    }


def compact(value: Any) -> Any:
    """Write lists of flags as one text of 0s and 1s."""
    if isinstance(value, dict):
        return {key: compact(inner) for key, inner in value.items()}
    is_flags = isinstance(value, list) and value and all(isinstance(flag, bool) for flag in value)
    return "".join("01"[flag] for flag in value) if is_flags else value


if __name__ == "__main__":
    out = compact(record(Path(sys.argv[1]).resolve(), sys.argv[2], Path(sys.argv[3]).resolve()))
    text = json.dumps(out, ensure_ascii=False, separators=(",", ":"))
    file = Path(__file__).with_name("answers.json.gz")
    file.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
