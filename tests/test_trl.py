"""Laws of TRL's trainers on a model with interventions: as they are, and with `ReftMixin`."""

import math
import shutil

import datasets
import pytest
import torch
from processors import text_tokenizer
from test_trainer import ADAPTER, KINDS, arguments, base_numbers, fall, numbers, same
from transformers import LlamaForSequenceClassification

import vlreft

trl = pytest.importorskip("trl")
# TRL asks transformers for this.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

MIXES = pytest.mark.parametrize("mixed", [True, False], ids=["with the mixin", "unmodified"])
REWARD = ("a red circle", "no, it is not")


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def with_mixin(trainer):
    return type(f"Reft{trainer.__name__}", (vlreft.ReftMixin, trainer), {})


def config(kind_of_config, folder, **options):
    args = arguments(folder).to_dict() | {"max_length": None} | options
    return kind_of_config(**{name: args[name] for name in kind_of_config.__dataclass_fields__ if name in args})


def sft_rows(kind):
    if not kind.has_images:
        rows = [{"prompt": f"{row['question']} ", "completion": row["answer"]} for row in kind.rows()]
    else:
        rows = [
            {
                "images": [row["image"]],
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in kind.rows()
        ]
    return datasets.Dataset.from_list(rows)


def pairs(kind):
    """Rows with a preferred answer, which the base does not prefer."""
    rows = []
    for row in sft_rows(kind).to_list() if not kind.has_images else list(sft_rows(kind)):
        good = row.pop("completion")
        bad = "there are two circles" if isinstance(good, str) else [{"role": "assistant", "content": "two circles"}]
        rows.append(row | {"chosen": good, "rejected": bad})
    return datasets.Dataset.from_list(rows)


def sft(kind, model, folder, mixed=True, **options):
    trainer = with_mixin(trl.SFTTrainer) if mixed else trl.SFTTrainer
    args = config(trl.SFTConfig, folder, **options)
    return trainer(model=model, args=args, train_dataset=sft_rows(kind), processing_class=kind.processor())


def dpo(kind, model, folder, mixed=True, **options):
    trainer = with_mixin(trl.DPOTrainer) if mixed else trl.DPOTrainer
    return trainer(
        model=model,
        ref_model=vlreft.reference(model),
        args=config(trl.DPOConfig, folder, **options),
        train_dataset=pairs(kind),
        processing_class=kind.processor(),
    )


@MIXES
def test_sft_trains_the_interventions_alone(kind, mixed, tmp_path):
    model, reft = kind.attached()
    base, start = base_numbers(model), numbers(reft)
    trainer = sft(kind, model, tmp_path, mixed, num_train_epochs=4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("pixel_values" in batch) == kind.has_images
    assert (batch["labels"][:, :3] == -100).all()  # the prompts are not learnt
    trainer.train()
    assert fall(trainer) > 0.1
    assert [name for name, value in numbers(reft).items() if torch.equal(value, start[name])] == []
    assert same(base_numbers(model), base)


def test_sft_trains_the_same_with_the_mixin_as_without(kind, tmp_path):
    ends = []
    for mixed in (True, False):
        model, reft = kind.attached(dropout=0.1)
        sft(kind, model, tmp_path, mixed).train()
        ends.append(numbers(reft))
    assert same(*ends)


@pytest.mark.parametrize("make", [sft, dpo], ids=["sft", "dpo"])
def test_checkpoints_hold_the_adapter_alone_and_resume(make, kind, tmp_path):
    model, reft = kind.attached(dropout=0.3)
    make(kind, model, tmp_path / "whole", save_strategy="steps", save_steps=2, disable_dropout=False).train()
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert names >= ADAPTER
    assert not any(name.startswith(("model", "pytorch")) for name in names)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    model, other = kind.attached(seed=99, dropout=0.3)
    make(kind, model, tmp_path / "resumed", disable_dropout=False).train(resume_from_checkpoint=True)
    assert same(numbers(other), numbers(reft))


@MIXES
def test_dpo_starts_at_log_2_and_raises_the_margin(kind, mixed, tmp_path):
    model, _ = kind.attached()
    base = base_numbers(model)
    trainer = dpo(kind, model, tmp_path, mixed, num_train_epochs=4)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert logs[-1]["rewards/margins"] > 0.1
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert same(base_numbers(model), base)


def test_dpo_compares_with_the_frozen_base(kind, tmp_path):
    """Off the identity start too: the loss is that of the formula, with the base's own log-probabilities."""
    model, reft = kind.attached(init="reference")
    trainer = dpo(kind, model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def log_probabilities():
        with torch.no_grad():
            logits = model(**inputs, labels=labels).logits[:, :-1].log_softmax(-1)
        mask = labels[:, 1:] != -100
        tokens = logits.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return (tokens * mask).sum(1).chunk(2)

    chosen, rejected = log_probabilities()
    with reft.disabled():
        base_chosen, base_rejected = log_probabilities()
    assert not torch.allclose(chosen, base_chosen)
    margin = trainer.beta * ((chosen - base_chosen) - (rejected - base_rejected))
    expected = -torch.nn.functional.logsigmoid(margin).mean()
    model.train()
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), abs=1e-5)


def reward_model():
    tokenizer = text_tokenizer(chat=True)
    settings = KINDS["text"].model().config.to_dict() | {"num_labels": 1, "architectures": None}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(type(KINDS["text"].model().config).from_dict(settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.eval(), tokenizer


@MIXES
def test_a_reward_model_learns_with_its_score(mixed, tmp_path):
    model, tokenizer = reward_model()
    edits = [vlreft.Intervention("loreft", layers=[0, 1], positions="f2+l2", rank=2)]
    reft = vlreft.attach(model, vlreft.ReftConfig(edits, modules_to_save=["score"]))
    base, start = base_numbers(model), [parameter.detach().clone() for parameter in reft.parameters()]
    trainer = (with_mixin(trl.RewardTrainer) if mixed else trl.RewardTrainer)(
        model=model,
        args=config(trl.RewardConfig, tmp_path, num_train_epochs=4, save_strategy="epoch"),
        train_dataset=pairs(KINDS["text"]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert fall(trainer) > 0.1
    assert [i for i, p in enumerate(reft.parameters()) if torch.equal(p, start[i])] == []
    assert same(base_numbers(model), base)
    if mixed:
        batch = tokenizer(REWARD[0], return_tensors="pt")
        with torch.no_grad():
            reward = model.eval()(**batch).logits
        again, _ = reward_model()
        vlreft.load(again, tmp_path / "checkpoint-12")
        with torch.no_grad():
            assert again(**batch).logits.equal(reward)
