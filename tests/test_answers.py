"""Answers written as they come: what an interrupted evaluation leaves is what an uninterrupted one has."""

import json

import pytest
import torch
from processors import text_tokenizer, tiny_text_model
from transformers import TrainingArguments

import vlreft
from vlreft.training.answers import AnswerFile, answer_all, read_answers

ROWS = [{"question_id": 100 + i, "question": f"what is {i} ?", "answer": "red"} for i in range(11)]


def line(row, answer):
    return {"question_id": row["question_id"], "answer": answer}


class Answering:
    """Answers with the question's last word but one; stops after some batches, as a killed process does."""

    def __init__(self, num_batches=99):
        self.left, self.seen = num_batches, []

    def __call__(self, examples):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += [row["question_id"] for row in examples]
        return [row["question"].split()[-2] for row in examples]


def run(path, answer, key="k", **options):
    file = AnswerFile(path, key, line=line, **options)
    return answer_all(answer, ROWS, range(len(ROWS)), 3, file=file, is_shown=False)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("num_batches", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", [b"", b'{"id": "10', b'{"id": "103", "answer": "3"}'])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(num_batches, torn, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole / "a.jsonl", Answering()) == [str(i) for i in range(11)]
    with pytest.raises(KeyboardInterrupt):
        run(cut / "a.jsonl", Answering(num_batches))
    with (cut / "a.jsonl").open("ab") as out:
        out.write(torn)
    second = Answering()
    assert run(cut / "a.jsonl", second) == [str(i) for i in range(11)]
    assert second.seen == [row["question_id"] for row in ROWS[3 * num_batches :]]
    assert contents(whole) == contents(cut)


def test_a_submission_that_lacks_its_last_batch_is_made_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a.jsonl", Answering(2))
    submission = tmp_path / "a.submission.jsonl"
    submission.write_text("".join(submission.read_text().splitlines(keepends=True)[:4]))
    second = Answering()
    run(tmp_path / "a.jsonl", second)
    assert second.seen[0] == 103
    assert [json.loads(entry) for entry in submission.read_text().splitlines()] == [
        line(row, str(place)) for place, row in enumerate(ROWS)
    ]


def test_a_finished_file_is_read_not_made(tmp_path):
    run(tmp_path / "a.jsonl", Answering())
    assert run(tmp_path / "a.jsonl", Answering(0)) == [str(i) for i in range(11)] == read_answers(tmp_path / "a.jsonl")


def test_answers_of_something_else_are_refused_or_replaced(tmp_path):
    run(tmp_path / "a.jsonl", Answering())
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds answers of another adapter"):
        run(tmp_path / "a.jsonl", Answering(), key="other")
    assert contents(tmp_path) == before
    second = Answering()
    run(tmp_path / "a.jsonl", second, key="other", replace=True)
    assert len(second.seen) == 11


def test_answers_to_other_rows_and_lines_that_are_none_are_refused(tmp_path):
    run(tmp_path / "a.jsonl", Answering())
    file = AnswerFile(tmp_path / "a.jsonl", "k")
    with pytest.raises(ValueError, match=r"a\.jsonl answers other rows"):
        file.resume(3, [str(i) for i in range(11)])
    (tmp_path / "a.jsonl").write_text("{}\nnot JSON\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: is not JSON"):
        file.resume(3, ["1", "2"])


# In the trainer ------------------------------------------------------------------------------------------------------


def trainer(folder, **options):
    torch.manual_seed(0)
    tokenizer = text_tokenizer(chat=True)
    model = tiny_text_model(tokenizer)
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", positions="l2", rank=2)))
    args = TrainingArguments(
        str(folder), max_steps=2, eval_steps=1, eval_strategy="steps", per_device_train_batch_size=4,
        per_device_eval_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.1,
        save_strategy="no",
    )  # fmt: skip
    return reft, vlreft.ReftTrainer(
        model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS, data_collator=vlreft.Collator(tokenizer),
        generation={"max_new_tokens": 3, "do_sample": False}, **options,
    )  # fmt: skip


def test_the_trainer_writes_answers_and_takes_them_up_again(tmp_path, monkeypatch):
    _, made = trainer(tmp_path)
    plain = made.predict_answers(ROWS)
    generate, calls = made.reft.model.generate, []

    def counted(**batch):
        calls.append(len(batch["input_ids"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(**batch)

    monkeypatch.setattr(made.reft.model, "generate", counted)
    for _ in range(2):
        file = AnswerFile(tmp_path / "a.jsonl", made.answers_key())
        try:
            answers = made.predict_answers(ROWS, file=file)
        except KeyboardInterrupt:
            assert len(read_answers(tmp_path / "a.jsonl")) == 4
    assert answers == plain
    assert calls == [4, 4, 4, 3]


def test_the_key_is_of_what_answers_depend_on(tmp_path):
    reft, made = trainer(tmp_path)
    keys = [made.answers_key()]
    with reft.disabled():
        keys.append(made.answers_key())
    made.generation["max_new_tokens"] = 2
    keys.append(made.answers_key())
    made.args.per_device_eval_batch_size = 2
    keys.append(made.answers_key())
    with torch.no_grad():
        next(reft.parameters()).add_(1e-3)
    keys.append(made.answers_key())
    assert len(set(keys)) == len(keys)
    assert made.answers_key() == keys[-1]


def test_every_evaluation_leaves_its_answers(tmp_path):
    seen = []

    def metrics(answers, _):
        seen.append(list(answers))
        return {"length": len(answers)}

    _, made = trainer(tmp_path, answer_metrics=metrics)
    made.train()
    files = sorted((tmp_path / "answers").glob("*.jsonl"))
    assert [file.name for file in files] == ["eval-000001.jsonl", "eval-000002.jsonl"]
    assert [read_answers(file) for file in files] == seen


def test_the_running_score_is_of_the_answers_so_far(tmp_path):
    _, made = trainer(tmp_path)
    made.args.disable_tqdm = False
    heads = []
    answers = made.predict_answers(ROWS, score=lambda found: heads.append(list(found)) or 0.5)
    assert heads == [answers[:4], answers[:8]]
