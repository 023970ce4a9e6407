"""The field's harnesses take a model with interventions: their answers and scores are those of the model itself.

Each test is skipped where its harness is not installed; the two have extras of their own, `lm-eval` and `lmms-eval`.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from zoo import shake

import vlreft

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
# The harnesses and what they import warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def script(monkeypatch):
    """Import an example as its user does, from its folder."""

    def load(name, harness):
        pytest.importorskip(harness, reason=f"{harness} is not installed")
        monkeypatch.delitem(sys.modules, "common", raising=False)
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        return importlib.import_module(name)

    yield load
    for name in ("common", "evaluate_lm_eval", "evaluate_lmms_eval"):
        sys.modules.pop(name, None)


def attach(model, positions="prompt:l4"):
    return shake(vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", positions=positions, rank=4))))


def own_answers(model, collator, rows):
    batch = collator.prompts(rows)
    with torch.no_grad():
        ids_BS = model.generate(**batch, max_new_tokens=32, do_sample=False)
    return collator.decode(ids_BS, batch["input_ids"].shape[1])


# lm-evaluation-harness --------------------------------------------------------------------------------------------


@pytest.fixture
def lm_eval_script(script):
    return script("evaluate_lm_eval", "lm_eval")


@pytest.fixture
def demo_lm():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "demo-lm", dtype=torch.float32).eval()
    model.generation_config.max_new_tokens = None
    return model, AutoTokenizer.from_pretrained(ASSETS / "demo-lm")


@pytest.fixture
def rows(tmp_path):
    """Write and return questions of several lengths, so that batches are padded."""
    lines = (ASSETS / "demo-vqa/lm_code/test.jsonl").read_text().splitlines()
    found = sorted((json.loads(line) for line in lines), key=lambda row: len(row["question"].split()))
    found = found[:: len(found) // 13]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return found


def scored_by_labels(model, prompt_ids, continuation_ids):
    """Score one continuation on its own, the prompt's end told by the labels, as in training."""
    ids_1L = torch.tensor([prompt_ids + continuation_ids])
    labels_1L = ids_1L.clone()
    labels_1L[:, : len(prompt_ids)] = -100
    with torch.no_grad():
        logits = model(input_ids=ids_1L, labels=labels_1L).logits[0, len(prompt_ids) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(continuation_ids)[:, None]).sum())


def requests_of(lm, rows):
    """Return each question with continuations of one token, and of several."""
    prompts = [lm.apply_chat_template([{"role": "user", "content": row["question"]}]) for row in rows]
    texts = [(prompt, text) for prompt in prompts for text in ("kiv", "zib", "blick toma", "there is a large circle")]
    return [(pair, *lm._encode_pair(*pair)) for pair in texts]


def log_likelihoods(lm, requests):
    return [score for score, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]


def test_lm_eval_generates_our_answers(lm_eval_script, demo_lm, rows, tmp_path):
    model, tokenizer = demo_lm
    reft, collator = attach(model), vlreft.Collator(tokenizer)
    lm = lm_eval_script.ReftLM(model, tokenizer, batch_size=5)
    task = lm_eval_script.demo_tasks(tmp_path / "test.jsonl")[0]

    def answers_of_the_harness():
        samples = lm_eval_script.evaluate(lm, [task])["samples"]["demo_generated"]
        assert [sample["doc"]["question"] for sample in samples] == [row["question"] for row in rows]
        return [sample["resps"][0][0].strip() for sample in samples]

    after = answers_of_the_harness()
    assert after == own_answers(model, collator, rows)
    with reft.disabled():
        before = answers_of_the_harness()
        assert before == own_answers(model, collator, rows)
    assert sum(map(str.__ne__, before, after)) > len(rows) // 2


@pytest.mark.parametrize("positions", ["prompt:l4", "prompt:f2+l3", "response:all"])
@pytest.mark.parametrize("max_length", [None, 16], ids=["whole", "cut"])
def test_lm_eval_scores_as_training_does_whatever_the_batch_size(lm_eval_script, demo_lm, rows, positions, max_length):
    model, tokenizer = demo_lm
    attach(model, positions)
    scores = {}
    for size in (1, 7, 64):
        lm = lm_eval_script.ReftLM(model, tokenizer, batch_size=size)
        lm._max_length = max_length
        requests = requests_of(lm, rows)
        scores[size] = log_likelihoods(lm, requests)
    kept = [request[1][max(0, len(request[1]) + len(request[2]) - lm.max_length - 1) :] for request in requests]
    assert any(len(prompt) < len(request[1]) for prompt, request in zip(kept, requests, strict=True)) == bool(
        max_length
    )
    ours = [scored_by_labels(model, prompt, request[2]) for prompt, request in zip(kept, requests, strict=True)]
    for found in scores.values():
        assert found == pytest.approx(ours, abs=1e-3)


def test_plain_hflm_scores_another_model_than_the_one_that_generates(lm_eval_script, demo_lm, rows):
    """If this fails the harness has learnt to pass masks, and `ReftLM` can go."""
    model, tokenizer = demo_lm
    reft = attach(model)
    ours = lm_eval_script.ReftLM(model, tokenizer, batch_size=7)
    requests = requests_of(ours, rows)
    plain = {
        size: lm_eval_script.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, logits_cache=False)
        for size in (1, 7)
    }
    scores = {size: torch.tensor(log_likelihoods(lm, requests)) for size, lm in plain.items()}
    assert (scores[1] - scores[7]).abs().max() > 0.1
    is_one_token = torch.tensor([len(request[2]) == 1 for request in requests])
    wrong = (scores[1] - torch.tensor(log_likelihoods(ours, requests))).abs()
    assert wrong[is_one_token].max() < 1e-3  # what is read is the prompt alone
    assert wrong[~is_one_token].max() > 0.1
    with reft.disabled():
        assert log_likelihoods(ours, requests) == pytest.approx(log_likelihoods(plain[7], requests), abs=1e-3)


def test_lm_eval_scores_whole_texts(lm_eval_script, demo_lm):
    from lm_eval.api.instance import Instance

    model, tokenizer = demo_lm
    attach(model)
    lm = lm_eval_script.ReftLM(model, tokenizer, batch_size=2)
    texts = ["there is a small red triangle", "there is a large cyan circle , a small red triangle . tell the hue"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
    found = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ours = [scored_by_labels(model, [lm.prefix_token_id], row) for row in ids]  # its prompt is the start token alone
    assert found == pytest.approx(ours, abs=1e-3)


def test_rows_that_were_not_asked_for_are_refused(lm_eval_script, demo_lm):
    model, tokenizer = demo_lm
    lm = lm_eval_script.ReftLM(model, tokenizer, batch_size=2)
    with pytest.raises(RuntimeError, match="not the rows that were asked for"):
        lm._model_call(pad_sequence([torch.tensor([2, 5, 7])], batch_first=True))


@pytest.mark.slow
def test_lm_eval_script_shows_what_interventions_do(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    scores = trained_and_evaluated("finetune_lm", "evaluate_lm_eval", tmp_path)
    assert scores["base"]["demo_generated exact_match"] <= 0.05
    assert scores["base"]["demo_choice acc"] <= 0.25  # chance is one in eight
    assert scores["reft"]["demo_generated exact_match"] >= 0.95
    assert scores["reft"]["demo_choice acc"] >= 0.95


# lmms-eval --------------------------------------------------------------------------------------------------------


def test_lmms_eval_generates_our_answers(script, tmp_path):
    example = script("evaluate_lmms_eval", "lmms_eval")
    lm = example.load_lm(str(ASSETS / "demo-llava"))
    model, limit = lm.model, 12
    assert type(model) is type(AutoModelForImageTextToText.from_pretrained(ASSETS / "demo-llava"))
    task = example.demo_task(ASSETS / "demo-vqa/code", tmp_path / "data")
    rows = [task.test_docs()[index] for index in range(limit)]
    reft, collator = attach(model), vlreft.Collator(AutoProcessor.from_pretrained(ASSETS / "demo-llava"))

    def answers_of_the_harness():
        samples = example.evaluate(lm, model, [task], limit)["samples"]["demo_vqa"]
        return [sample["filtered_resps"][0].strip() for sample in sorted(samples, key=lambda sample: sample["doc_id"])]

    after = answers_of_the_harness()
    assert after == own_answers(model, collator, rows)
    with reft.disabled():
        before = answers_of_the_harness()
        assert before == own_answers(model, collator, rows)
    assert sum(map(str.__ne__, before, after)) > limit // 2


@pytest.mark.slow
def test_lmms_eval_script_shows_what_interventions_do(tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms_eval is not installed")
    scores = trained_and_evaluated("finetune_vqa", "evaluate_lmms_eval", tmp_path)
    assert scores["base"]["demo_vqa exact_match"] <= 0.05
    assert scores["reft"]["demo_vqa exact_match"] >= 0.95


def trained_and_evaluated(train, evaluate, folder):
    """Run two scripts one after the other, as a user does; return the scores that the second writes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    commands = [
        [train, "--output", str(folder / "trained")],
        [evaluate, "--adapter", str(folder / "trained" / "adapter"), "--output", str(folder / "scores")],
    ]
    for name, *options in commands:
        command = [sys.executable, f"examples/{name}.py", *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "scores" / "results.json").read_text())
