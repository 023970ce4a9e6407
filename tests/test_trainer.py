"""Laws of `ReftTrainer` and `ReftMixin` over a text model and a vision-language model; also of unmodified trainers."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processors import text_tokenizer, tiny_llava_model, tiny_llava_processor, tiny_text_model
from recording import places, recorded
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, pipeline

import vlreft
from vlreft.edit import orthonormal_rows

COLOURS = ("red", "green", "blue")
ANSWERS = ("yes", "no, it is not", "a {colour} circle and a blue square")  # of different lengths, on purpose
QUESTIONS = ("what is in the picture?", "is the square left of the circle?", "describe the image", "how many circles?")


@cache
def llava():
    return tiny_llava_processor()


@cache
def tokenizer():
    return text_tokenizer(chat=True)


def text_edits(**options):
    # Not on the last block: what stands there in front of the answer is read by nobody.
    return [vlreft.Intervention("loreft", layers=[0, 1], positions="question:f2+l2", rank=2, **options)]


def image_edits(**options):
    return [
        *text_edits(**options),
        vlreft.Intervention("loreft", site="vision", positions="patches", rank=2, **options),
        vlreft.Intervention("loreft", site="connector", positions="image:all", rank=2, **options),
    ]


@dataclass(frozen=True)
class Kind:
    """What the trainer trains: a model, its processor, and edits for it."""

    name: str
    processor: Callable
    build: Callable
    edits: Callable
    has_images: bool = field(default=False)

    def model(self):
        """Make the base, in eval mode: always the same one, loud enough to learn from and to tell prompts apart."""
        model = self.build(self.processor())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5 if parameter.dim() > 1 else 1)
        return model

    def attached(self, seed=1, dtype=torch.float32, **options):
        model = self.model().to(dtype)
        torch.manual_seed(seed)
        return model, vlreft.attach(model, vlreft.ReftConfig(self.edits(**options)))

    def collator(self):
        return vlreft.Collator(self.processor())

    def rows(self, num_rows=12):
        rows = []
        for i in range(num_rows):
            colour = COLOURS[i % 3]
            row = {
                "question": QUESTIONS[i % 4],
                "answer": ANSWERS[(i // 2) % 3].format(colour=colour),
                "id": f"row {i}",
            }
            rows.append(row | ({"image": Image.new("RGB", (40, 30), colour)} if self.has_images else {}))
        return rows


KINDS = {
    "text": Kind("text", tokenizer, tiny_text_model, text_edits),
    "vqa": Kind("vqa", llava, tiny_llava_model, image_edits, has_images=True),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def arguments(folder, **options):
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 0.02,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def trainer_for(kind, model, folder, *, rows=None, trainer=vlreft.ReftTrainer, parts=None, **options):
    """Make a trainer for a kind's rows; `parts` are its own arguments, `options` those of TrainingArguments."""
    rows = kind.rows() if rows is None else rows
    defaults = {"data_collator": kind.collator(), "train_dataset": rows}
    return trainer(model=model, args=arguments(folder, **options), **(defaults | (parts or {})))


def numbers(reft):
    return {name: parameter.detach().clone() for name, parameter in reft.edits.named_parameters()}


def base_numbers(model):
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("vlreft.")}


def same(ours, theirs):
    """Whether two nests of dicts, lists, tensors and numbers are equal, tensors bit for bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(same(*pair) for pair in zip(ours, theirs, strict=True))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def distance(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fall(trainer):
    """By how much the loss fell, over the first and the last three steps: batches differ."""
    history = losses(trainer)
    return sum(history[:3]) / 3 - sum(history[-3:]) / 3


def accuracy(answers, examples):
    right = [answer == example["answer"] for answer, example in zip(answers, examples, strict=True)]
    return {"accuracy": sum(right) / len(right)}


def gradients(trainer, batch):
    """The loss and the gradients of one training step on a batch, as the trainer takes it."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=(batch["labels"] != -100).sum())
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.reft.edits.named_parameters()}


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list])
def test_training_lowers_the_loss_and_moves_the_interventions_only(kind, form, tmp_path):
    model, reft = kind.attached()
    base, start = base_numbers(model), numbers(reft)
    trainer = trainer_for(kind, model, tmp_path, rows=form(kind.rows()), num_train_epochs=5)
    trainer.train()
    assert fall(trainer) > 0.1
    end = numbers(reft)
    assert [name for name in start if torch.equal(start[name], end[name])] == []
    assert same(base_numbers(model), base)
    assert [p for name, p in model.named_parameters() if p.grad is not None and not name.startswith("vlreft.")] == []
    reft.detach()
    assert same(dict(model.state_dict()), base)


def test_a_datasets_table_trains_like_its_rows(kind, tmp_path):
    ends = []
    for form in (list, datasets.Dataset.from_list):
        model, reft = kind.attached()
        trainer_for(kind, model, tmp_path, rows=form(kind.rows())).train()
        ends.append(numbers(reft))
    assert same(*ends)


def test_an_unmodified_trainer_gives_the_same_weights(kind, tmp_path):
    ends = []
    for trainer in (vlreft.ReftTrainer, Trainer):
        model, reft = kind.attached(dropout=0.1)
        options = {"remove_unused_columns": trainer is not Trainer}
        trainer_for(kind, model, tmp_path, trainer=trainer, **options).train()
        ends.append(numbers(reft))
    assert same(*ends)


def test_worker_processes_give_the_same_weights(kind, tmp_path):
    ends = []
    for num_workers in (0, 1):
        model, reft = kind.attached()
        options = {"num_train_epochs": 1, "dataloader_num_workers": num_workers}
        trainer_for(kind, model, tmp_path, **options).train()
        ends.append(numbers(reft))
    assert same(*ends)


def test_a_compiled_model_trains_and_saves(tmp_path):
    """Compiled by a backend that only rounds anew; it is the wrapping that could lose the interventions."""
    kind, ends = KINDS["text"], []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model, reft = kind.attached()
        options |= {"num_train_epochs": 1, "save_strategy": "epoch"}
        trainer_for(kind, model, tmp_path, rows=kind.rows(1) * 8, **options).train()
        ends.append(numbers(reft))
        assert same(numbers(vlreft.load(kind.model(), tmp_path / "checkpoint-2")), ends[-1])
    assert distance(*ends) < 1e-6


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_gradients_equal_those_of_the_big_batch(kind, micro, tmp_path):
    """Plain gradient descent, so that a wrong scale of the gradients shows in the weights."""
    lengths = {(kind.collator()([row])["labels"] != -100).sum().item() for row in kind.rows()}
    assert len(lengths) >= 3  # otherwise a mean of means would pass
    ends, logs = [], []
    for size in (4, micro):
        model, reft = kind.attached()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        options |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
        trainer = trainer_for(kind, model, tmp_path, **options)
        trainer.train()
        ends.append(numbers(reft))
        logs.append(losses(trainer))
    assert distance(*ends) < 1e-6
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)  # losses near 6, rounded on the way at 5e-7


# Reentrant checkpoints announce that blocks in front of the first edit give no gradient; there is none to give.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
# The new name, activation checkpointing, is not in all transformers that vlreft runs with.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, use_reentrant, tmp_path):
    ends = []
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    for options in ({}, checkpointing):
        model, reft = kind.attached(dropout=0.1)
        trainer = trainer_for(kind, model, tmp_path, num_train_epochs=1, **options)
        trainer.train()
        assert model.is_gradient_checkpointing == bool(options)
        ends.append(numbers(reft))
    assert same(*ends)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_half_precision_trains_with_interventions_in_full(kind, dtype, autocast, tmp_path):
    model, reft = kind.attached(dtype=dtype)
    base = base_numbers(model)
    trainer = trainer_for(kind, model, tmp_path, num_train_epochs=5, bf16=autocast)
    trainer.train()
    assert {parameter.dtype for parameter in reft.parameters()} == {torch.float32}
    assert {value.dtype for value in base_numbers(model).values() if value.is_floating_point()} == {dtype}
    assert same(base_numbers(model), base)
    assert fall(trainer) > 0.1


def test_weight_decay_leaves_rotations_orthonormal_and_edits_alive(kind, tmp_path):
    model, reft = kind.attached()
    trainer_for(kind, model, tmp_path, num_train_epochs=5, weight_decay=0.1).train()
    rotations = [edit.rotation.detach() for edit in reft.edits.values()]
    assert len(rotations) == len(reft.edits)
    for rotation in rotations:
        rows = orthonormal_rows(rotation)
        torch.testing.assert_close(rows @ rows.T, torch.eye(2), atol=1e-6, rtol=0)
    model.eval()
    batch = kind.collator().prompts(kind.rows()[:4])
    with torch.no_grad():
        edited = model(**batch).logits
        with reft.disabled():
            assert (model(**batch).logits - edited).abs().max() > 0.1


def mixed_rows():
    """Rows with one image, none and two; the last four, a whole batch without shuffling, have none at all."""
    rows = KINDS["vqa"].rows()
    for i, row in enumerate(rows):
        image = row.pop("image")
        row["images"] = [] if i >= 8 else [image] * (i % 3)
    return rows


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list])
def test_rows_with_and_without_images_train_together(form, tmp_path):
    kind = KINDS["vqa"]
    model, _ = kind.attached()
    trainer = trainer_for(
        kind, model, tmp_path, rows=form(mixed_rows()), num_train_epochs=5, train_sampling_strategy="sequential"
    )
    trainer.train()
    assert all(map(math.isfinite, losses(trainer)))
    assert losses(trainer)[-1] < losses(trainer)[2]
    _, grads = gradients(trainer, kind.collator()(mixed_rows()[8:]))
    for name, grad in grads.items():
        has_image = ":text:" not in name
        assert bool(grad.any()) != has_image, name


def test_generating_inside_a_callback_disturbs_nothing(kind, tmp_path):
    class Look(TrainerCallback):
        def __init__(self, modes):
            self.modes, self.answers = modes, []

        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step % 2:
                return
            batch = kind.collator().prompts(kind.rows()[:3])
            was_training = model.training
            model.train(self.modes == "train")
            self.answers.append(model.generate(**batch, max_new_tokens=3, do_sample=False))
            model.train(was_training)

    ends = []
    for look in (None, Look("eval"), Look("train")):
        model, reft = kind.attached()
        trainer_for(kind, model, tmp_path, parts={"callbacks": [look] if look else []}).train()
        ends.append(numbers(reft))
        assert look is None or len(look.answers) == 3
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


# --- losses of one's own, which take the labels away ---------------------------------------------------------------


def own_loss(outputs, labels, num_items_in_batch=None):
    """At a temperature, so that no other loss could pass for it."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1) / 2, labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def smoothed_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum") / num_items_in_batch


TAKEN = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}, smoothed_loss),
    "own loss": ({}, {"compute_loss_func": own_loss}, own_loss),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_trainer_that_takes_the_labels_edits_the_prompts_all_the_same(kind, case, tmp_path):
    options, parts, by_hand = TAKEN[case]
    model, reft = kind.attached(init="reference")
    batch = kind.collator()(kind.rows()[:4])
    prompts = kind.collator().prompts(kind.rows()[:4])
    block = model.get_decoder().layers[0]
    with recorded(block) as changes:
        plain = trainer_for(kind, model, tmp_path)
        gradients(plain, batch)
        taking = trainer_for(kind, model, tmp_path, parts=parts, **options)
        loss, grads = gradients(taking, batch)
        model.eval()
        model.generate(**prompts, max_new_tokens=1)
    with_labels, without, generating = changes
    assert torch.equal(with_labels, without)
    # The prompts of training are padded on the right, those of generation on the left.
    starts = prompts["attention_mask"].argmax(1).tolist()
    for row, start in enumerate(starts):
        edited = places(without[row]).nonzero()[:, 0] + start
        assert edited.tolist() == places(generating[row]).nonzero()[:, 0].tolist()
        assert len(edited) == 4

    model.train()
    model.zero_grad()
    is_prompt = (batch["labels"] != -100).cumsum(1) == 0
    outputs = model(**{key: value for key, value in batch.items() if key != "labels"}, prompt_mask=is_prompt)
    expected = by_hand(outputs, batch["labels"], (batch["labels"] != -100).sum())
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert distance(grads, {name: p.grad for name, p in reft.edits.named_parameters()}) < 1e-6


@pytest.mark.parametrize("case", TAKEN)
def test_a_trainer_that_takes_the_labels_learns_and_evaluates(kind, case, tmp_path):
    options, parts, _ = TAKEN[case]
    model, _ = kind.attached()
    parts = parts | {"eval_dataset": kind.rows()[:4]}
    trainer = trainer_for(kind, model, tmp_path, parts=parts, num_train_epochs=5, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.01


def test_an_unmodified_trainer_that_takes_the_labels_is_stopped(kind, tmp_path):
    model, _ = kind.attached()
    options = {"remove_unused_columns": False, "label_smoothing_factor": 0.1}
    with pytest.raises(ValueError, match="prompt_mask"):
        trainer_for(kind, model, tmp_path, trainer=Trainer, **options).train()


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list])
@pytest.mark.parametrize("case", ["own labels", *TAKEN])
def test_a_prompt_mask_of_the_users_is_what_counts(form, case, tmp_path):
    """Two answers in a row, with the prompt said to end before the first: only a mask can say so."""
    kind = KINDS["text"]
    ids = list(range(20, 32))
    labels = [-100] * 6 + ids[6:8] + [-100] * 2 + ids[10:]
    rows = [{"input_ids": ids, "labels": labels, "prompt_mask": [place < 5 for place in range(12)]}] * 4
    options, parts, _ = TAKEN.get(case, ({}, {}, None))
    model, _ = kind.attached(init="reference")
    trainer = trainer_for(
        kind, model, tmp_path, rows=form(rows), parts=parts | {"data_collator": None}, max_steps=1, **options
    )
    with recorded(model.get_decoder().layers[0]) as changes:
        trainer.train()
    assert [row.nonzero()[:, 0].tolist() for row in places(changes[0])] == [[0, 1, 3, 4]] * 4


# --- checkpoints --------------------------------------------------------------------------------------------------

ADAPTER = {"reft_config.json", "reft_model.safetensors", "README.md"}
PROGRESS = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_checkpoints_hold_the_adapter_alone(kind, tmp_path):
    model, reft = kind.attached()
    trainer = trainer_for(kind, model, tmp_path, save_strategy="epoch")
    trainer.train()
    for step in (3, 6):
        files = {path.name: path.stat().st_size for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert files.keys() == ADAPTER | PROGRESS
        assert files["reft_model.safetensors"] < 4 * reft.num_parameters() + 200 * len(numbers(reft))
    loaded = vlreft.load(kind.model(), tmp_path / "checkpoint-6")
    assert same(numbers(loaded), numbers(reft))
    trainer.save_model()
    assert ADAPTER <= {path.name for path in tmp_path.iterdir()}
    assert same(numbers(vlreft.load(kind.model(), tmp_path)), numbers(reft))


def test_the_processor_is_saved_if_the_trainer_has_it(kind, tmp_path):
    model, _ = kind.attached()
    trainer = trainer_for(kind, model, tmp_path, parts={"processing_class": kind.processor()})
    trainer.save_model(str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert files > ADAPTER | {"tokenizer.json"}
    assert not any(name.startswith("model") or name.endswith(".bin") for name in files)


def progress(trainer):
    """The log without what a clock or a counter of work done in this process says."""
    own = ("runtime", "per_second", "total_flos", "train_loss")
    return [{k: v for k, v in entry.items() if not k.endswith(own)} for entry in trainer.state.log_history]


@pytest.mark.parametrize("start", [4, *(pytest.param(start, marks=pytest.mark.slow) for start in (6, 9))])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_gives_the_uninterrupted_run_bit_for_bit(kind, start, accumulate, tmp_path):
    """Steps 4 and 9 are inside of an epoch of six, with shuffling and dropout on the edit."""
    options = {"per_device_train_batch_size": 2 // accumulate, "gradient_accumulation_steps": accumulate}
    options |= {"save_steps": 1, "save_strategy": "steps", "weight_decay": 0.1}
    model, reft = kind.attached(dropout=0.3)
    whole = trainer_for(kind, model, tmp_path / "whole", **options)
    whole.train()
    assert whole.state.global_step == 12

    name = f"checkpoint-{start}"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    other_model, other_reft = kind.attached(seed=99, dropout=0.3)
    assert not same(numbers(other_reft), numbers(reft))
    torch.manual_seed(123)
    resumed = trainer_for(kind, other_model, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=True)

    assert same(numbers(other_reft), numbers(reft))
    assert same(progress(resumed), progress(whole))
    assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert same(resumed.lr_scheduler.state_dict(), whole.lr_scheduler.state_dict())
    read = [torch.load(tmp_path / run / "checkpoint-12" / "optimizer.pt") for run in ("whole", "resumed")]
    assert same(*read)


@dataclass
class Scores:
    """An `answer_metrics` with scores given in advance; keeps what it was called with."""

    scores: list
    calls: list = field(default_factory=list)

    def __call__(self, answers, examples):
        self.calls.append((list(answers), examples))
        return {"accuracy": self.scores[len(self.calls) - 1]}


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_best_checkpoint_is_loaded_at_the_end(kind, metric, tmp_path):
    """The evaluation wants what training unlearns, so that the best loss is not the last."""
    train = [row | {"answer": "yes"} for row in kind.rows()]
    scores = Scores([0.25, 0.5, 0.75, 0.5, 0.25])
    model, reft = kind.attached()
    parts = {"eval_dataset": [row | {"answer": "no"} for row in kind.rows(4)]}
    parts |= {"answer_metrics": scores, "generation": {"max_new_tokens": 1}} if metric == "accuracy" else {}
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 5, "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "learning_rate": 0.1}
    trainer = trainer_for(kind, model, tmp_path, rows=train, parts=parts, **options)
    trainer.train()
    values = [entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    best = (min if metric == "loss" else max)(values)
    step = 3 * (values.index(best) + 1)
    assert trainer.state.best_metric == best
    assert step < trainer.state.global_step == 15
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{step}"
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}", "checkpoint-15"}
    assert same(numbers(reft), numbers(vlreft.load(kind.model(), tmp_path / f"checkpoint-{step}")))
    assert not same(numbers(reft), numbers(vlreft.load(kind.model(), tmp_path / "checkpoint-15")))


def test_early_stopping_sees_the_answers(kind, tmp_path):
    model, _ = kind.attached()
    scores = Scores([0.5, 0.75, 0.75, 0.25, 1.0])
    parts = {"eval_dataset": kind.rows(3), "answer_metrics": scores, "callbacks": [EarlyStoppingCallback(2)]}
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 5}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    trainer = trainer_for(kind, model, tmp_path, parts=parts, **options)
    trainer.train()
    assert len(scores.calls) == 4
    assert trainer.state.best_metric == 0.75
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-6"


# --- evaluation ---------------------------------------------------------------------------------------------------


def one_by_one(kind, model, rows, **generation):
    answers = []
    for row in rows:
        batch = kind.collator().prompts([row])
        ids = model.generate(**batch, **generation)
        answers += kind.collator().decode(ids, batch["input_ids"].shape[1])
    return answers


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list])
def test_answers_are_those_of_single_prompts_in_their_order(kind, form, tmp_path):
    model, _ = kind.attached(init="reference", dropout=0.3)
    rows = kind.rows(7)
    parts = {"generation": {"max_new_tokens": 12, "do_sample": False}}
    trainer = trainer_for(kind, model, tmp_path, parts=parts, per_device_eval_batch_size=3)
    model.train()
    answers = trainer.predict_answers(form(rows))
    assert model.training
    model.eval()
    assert answers == one_by_one(kind, model, rows, max_new_tokens=12, do_sample=False)
    assert len(set(answers)) > 2  # otherwise any order would do


def test_evaluation_returns_the_loss_and_the_scores_of_the_answers(kind, tmp_path):
    train = [row | {"answer": "yes"} for row in kind.rows()]
    test = [row | {"answer": "yes" if i else "no"} for i, row in enumerate(kind.rows(4))]
    model, _ = kind.attached()
    parts = {"eval_dataset": test, "answer_metrics": accuracy, "generation": {"max_new_tokens": 1}}
    trainer = trainer_for(kind, model, tmp_path, rows=train, parts=parts, num_train_epochs=5)
    assert trainer.evaluate()["eval_accuracy"] == 0.0
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 0.75
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(model(**kind.collator()(test)).loss.item(), abs=1e-6)

    assert trainer.predict(test).metrics["test_accuracy"] == 0.75
    assert trainer.evaluate(train)["eval_accuracy"] == 1.0
    several = trainer.evaluate({"seen": train, "unseen": test})
    assert (several["eval_seen_accuracy"], several["eval_unseen_accuracy"]) == (1.0, 0.75)


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "tensor"])
def test_scores_of_any_number_type_reach_the_checkpoint(number, tmp_path):
    kind = KINDS["text"]
    model, _ = kind.attached()
    parts = {"eval_dataset": kind.rows(2), "answer_metrics": lambda *_: {"accuracy": number(0.5)}}
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    trainer_for(kind, model, tmp_path, parts=parts, **options).train()
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.5


def test_batches_without_labels_are_evaluated_as_prompts(kind, tmp_path):
    model, _ = kind.attached(init="reference")
    batches = [kind.collator().prompts([row]) for row in kind.rows(2)]
    collate = {"data_collator": lambda rows: rows[0]}
    trainer = trainer_for(kind, model, tmp_path, parts=collate, per_device_eval_batch_size=1)
    output = trainer.predict(batches)
    assert "test_loss" not in output.metrics
    for batch, logits in zip(batches, output.predictions, strict=True):
        with torch.no_grad():
            expected = model(**batch).logits[0].numpy()
        kept = logits[(logits != -100).any(-1)]
        assert np.array_equal(kept, expected)


# --- trainers and pipelines of others -----------------------------------------------------------------------------


def sft_rows():
    return datasets.Dataset.from_list(
        [{"prompt": f"{row['question']} ", "completion": row["answer"]} for row in KINDS["text"].rows()]
    )


def sft(trainer, model, folder, **options):
    trl = pytest.importorskip("trl")
    args = arguments(folder).to_dict() | {"max_length": None} | options
    known = {name: args[name] for name in trl.SFTConfig.__dataclass_fields__ if name in args}
    return trainer(
        model=model, args=trl.SFTConfig(**known), train_dataset=sft_rows(), processing_class=text_tokenizer(chat=True)
    )


def mixed_sft():
    trl = pytest.importorskip("trl")
    return type("ReftSFTTrainer", (vlreft.ReftMixin, trl.SFTTrainer), {})


@pytest.mark.parametrize("mixed", [True, False], ids=["with the mixin", "unmodified"])
def test_trl_trains_the_interventions_on_completions(mixed, tmp_path):
    trl = pytest.importorskip("trl")
    model, reft = KINDS["text"].attached()
    base, start = base_numbers(model), numbers(reft)
    trainer = sft(mixed_sft() if mixed else trl.SFTTrainer, model, tmp_path, num_train_epochs=5)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert (labels[:, :3] == -100).all()  # the prompts are not learnt
    trainer.train()
    assert fall(trainer) > 0.1
    assert [name for name, value in numbers(reft).items() if torch.equal(value, start[name])] == []
    assert same(base_numbers(model), base)


def test_trl_trains_the_same_with_the_mixin_as_without(tmp_path):
    trl = pytest.importorskip("trl")
    ends = []
    for trainer in (trl.SFTTrainer, mixed_sft()):
        model, reft = KINDS["text"].attached(dropout=0.1)
        sft(trainer, model, tmp_path).train()
        ends.append(numbers(reft))
    assert same(*ends)


def test_trl_with_the_mixin_saves_the_adapter_and_resumes(tmp_path):
    model, reft = KINDS["text"].attached(dropout=0.3)
    whole = sft(mixed_sft(), model, tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert names >= ADAPTER | PROGRESS
    assert not any(name.startswith("model") or name.endswith(".bin") for name in names)

    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    model, other_reft = KINDS["text"].attached(seed=99, dropout=0.3)
    resumed = sft(mixed_sft(), model, tmp_path / "resumed", save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert same(numbers(other_reft), numbers(reft))
    assert losses(resumed) == losses(whole)


# TRL is about to drop label smoothing; other trainers take the labels too.
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
def test_trl_with_the_mixin_keeps_the_prompt_when_it_takes_the_labels(tmp_path):
    model, _ = KINDS["text"].attached(init="reference")
    trainer = sft(mixed_sft(), model, tmp_path, label_smoothing_factor=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    with recorded(model.get_decoder().layers[0]) as changes:
        loss, _ = gradients(trainer, batch)
        model(**batch)
    without, _, with_labels = changes  # TRL's second forward is for its own metrics
    assert torch.equal(without, with_labels)
    outputs = model(**batch)
    expected = smoothed_loss(outputs, batch["labels"], (batch["labels"] != -100).sum())
    assert loss == pytest.approx(expected.item(), abs=1e-6)


def test_a_pipeline_gives_the_text_of_generate():
    kind = KINDS["text"]
    model, reft = kind.attached(init="reference")
    generation = {"max_new_tokens": 8, "do_sample": False}
    batch = kind.collator().prompts(kind.rows(1))
    pipe = pipeline("text-generation", model=model, tokenizer=kind.processor(), device="cpu")
    messages = [{"role": "user", "content": kind.rows(1)[0]["question"]}]
    texts = []
    for scope in (reft.disabled, lambda: torch.no_grad()):
        with scope():
            said = pipe(messages, return_full_text=False, **generation)[0]["generated_text"]
            ids = model.generate(**batch, **generation)
        assert said == kind.processor().decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append(said)
    assert texts[0] != texts[1]


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_model_without_interventions_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"none are attached.*vlreft\.attach"):
        trainer_for(kind, kind.model(), tmp_path)


def test_two_sets_of_interventions_are_refused(kind, tmp_path):
    model, reft = kind.attached()
    vlreft.attach(model, reft.config, "second")
    with pytest.raises(ValueError, match=r"several are attached, \['default', 'second'\]"):
        trainer_for(kind, model, tmp_path)


def test_detaching_before_training_is_refused(kind, tmp_path):
    model, reft = kind.attached()
    trainer = trainer_for(kind, model, tmp_path)
    reft.detach()
    with pytest.raises(ValueError, match="none are attached"):
        trainer.train()


def test_training_what_no_checkpoint_would_hold_is_refused(kind, tmp_path):
    model, reft = kind.attached()
    head = model.get_output_embeddings().weight.requires_grad_(True)
    trainer = trainer_for(kind, model, tmp_path)
    with pytest.raises(ValueError, match=r"1 parameters of the base are trainable \(lm_head\.weight.*freeze them"):
        trainer.train()
    head.requires_grad_(False)
    next(reft.parameters()).requires_grad_(False)  # a part that the user keeps as it is
    trainer.train()


def test_training_frozen_interventions_is_refused(kind, tmp_path):
    """What peft does to a model when LoRA is put beside the interventions."""
    peft = pytest.importorskip("peft")
    model, _ = kind.attached()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match=r"'default' are frozen.*call `vlreft\.attach` last"):
        trainer_for(kind, model, tmp_path).train()


def test_generated_answers_need_a_collator(kind, tmp_path):
    model, _ = kind.attached()
    parts = {"data_collator": lambda rows: kind.collator()(rows)}
    with pytest.raises(ValueError, match=r"`answer_metrics` needs `data_collator=vlreft\.Collator"):
        trainer_for(kind, model, tmp_path, parts=parts | {"answer_metrics": accuracy})
    with pytest.raises(ValueError, match=r"`predict_answers` needs `data_collator=vlreft\.Collator"):
        trainer_for(kind, model, tmp_path, parts=parts).predict_answers(kind.rows())


def test_replicas_in_threads_are_refused(kind, tmp_path):
    model, _ = kind.attached()
    trainer = trainer_for(kind, model, tmp_path)
    with pytest.raises(ValueError, match=r"DataParallel.*accelerate launch"):
        trainer.compute_loss(torch.nn.DataParallel(model), kind.collator()(kind.rows(2)))


@pytest.mark.parametrize("case", ["own labels", *TAKEN])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda labels: labels[1].fill_(-100), "row 1 of the batch has no labelled token"),
        (lambda labels: labels[1, 2].fill_(5), "row 1 of the batch has 2 separate answers"),
    ],
    ids=["no answer", "two answers"],
)
def test_rows_that_teach_nothing_or_two_things_are_refused(kind, case, damage, message, tmp_path):
    options, parts, _ = TAKEN.get(case, ({}, {}, None))

    def collate(rows):
        batch = kind.collator()(rows)
        damage(batch["labels"])
        return batch

    model, _ = kind.attached()
    options = options | {"remove_unused_columns": False}
    trainer = trainer_for(kind, model, tmp_path, parts=parts | {"data_collator": collate}, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_resuming_from_another_config_or_base_is_refused(tmp_path):
    kind = KINDS["text"]
    model, _ = kind.attached()
    trainer_for(kind, model, tmp_path, save_strategy="epoch", num_train_epochs=1).train()
    folder = str(tmp_path / "checkpoint-3")

    model, reft = kind.attached(scale=0.5)
    start = numbers(reft)
    with pytest.raises(ValueError, match=r"checkpoint-3 has another config: .*scale=1.0.*not .*scale=0.5"):
        trainer_for(kind, model, tmp_path).train(resume_from_checkpoint=folder)
    assert same(numbers(reft), start)

    model = KINDS["vqa"].model()
    vlreft.attach(model, vlreft.ReftConfig(text_edits()))
    with pytest.raises(ValueError, match=r"made for another base.*llama.*llava"):
        trainer_for(KINDS["vqa"], model, tmp_path).train(resume_from_checkpoint=folder)


def test_resuming_from_a_checkpoint_of_something_else_is_refused(tmp_path):
    kind = KINDS["text"]
    (tmp_path / "checkpoint-3").mkdir()
    model, _ = kind.attached()
    with pytest.raises(ValueError, match=r"no vlreft checkpoint in .*checkpoint-3"):
        trainer_for(kind, model, tmp_path).train(resume_from_checkpoint=True)
