"""Training of DAS and boundless DAS under the trainers: sources of a batch, gradients, answers, the learned width."""

import itertools
import random

import pytest
import torch
from PIL import Image
from processors import text_tokenizer, tiny_llava_model, tiny_llava_processor, tiny_text_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import vlreft
from vlreft.causes.boundless import BoundlessSchedule
from vlreft.causes.interchange import InterchangeCollator, interchange_accuracy


def arguments(folder, **settings):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3} | settings
    return TrainingArguments(
        str(folder), report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, **settings
    )


def das(positions="question:l2", layers=(0, 1), method="das", rank=2, **fields):
    if method == "das":
        fields["rank"] = rank
    return vlreft.Intervention(method, layers=layers, positions=positions, init="reference", **fields)


WORDS = ("red", "green", "blue", "yes")


def text_rows(num_rows=6):
    return [
        {
            "question": f"is the circle {WORDS[i % 3]}?",
            "answer": f"a {WORDS[(i + 1) % 4]} square",
            "source": {"question": f"what is in the {WORDS[i % 2]} picture today?"},
        }
        for i in range(num_rows)
    ]


def image_rows(num_rows=6):
    def picture(number):
        pixels = random.Random(number)
        return Image.new("RGB", (40, 40), tuple(pixels.randrange(256) for _ in range(3)))

    return [
        row | {"image": picture(i), "source": row["source"] | {"image": picture(100 + i)}}
        for i, row in enumerate(text_rows(num_rows))
    ]


def loud(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.eval()


def text_setup(**options):
    tokenizer = text_tokenizer(chat=True)
    return loud(tiny_text_model(tokenizer)), InterchangeCollator(vlreft.Collator(tokenizer), **options), text_rows()


def image_setup(**options):
    processor = tiny_llava_processor()
    return loud(tiny_llava_model(processor)), InterchangeCollator(vlreft.Collator(processor), **options), image_rows()


SETUPS = pytest.mark.parametrize("setup", [text_setup, image_setup], ids=["text", "llava"])


def by_hand(model, reft, collator, rows, positions=None):
    """Return the loss of a batch and the gradients, without any trainer."""
    batch = collator(rows)
    sources = batch.pop("sources")
    model.train()
    with reft.sources(sources, positions):
        loss = model(**batch).loss
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in reft.parameters()]
    for parameter in reft.parameters():
        parameter.grad = None
    return float(loss.detach()), gradients


@SETUPS
@pytest.mark.parametrize(
    ("reuse_prefix", "is_checkpointing"),
    [(False, False), ("auto", False), (False, True)],
    ids=["plain", "prefix reuse", "checkpointing"],
)
def test_a_step_has_the_gradients_of_the_sources(setup, reuse_prefix, is_checkpointing, tmp_path):
    component = "mlp" if is_checkpointing else "output"  # an edit inside the block runs once more in the backward pass
    model, collator, rows = setup()
    torch.manual_seed(1)
    reft = vlreft.attach(model, vlreft.ReftConfig(das(component=component)))
    loss, expected = by_hand(model, reft, collator, rows[:4])
    trainer = vlreft.ReftTrainer(
        model, arguments(tmp_path), train_dataset=rows, data_collator=collator, reuse_prefix=reuse_prefix
    )
    if is_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    found = trainer.training_step(model, collator(rows[:4]))
    assert float(found) == pytest.approx(loss, rel=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-4
    for parameter, gradient in zip(reft.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_source_positions_reach_the_trainer_and_the_accuracy(tmp_path, monkeypatch):
    model, collator, rows = text_setup(source_positions="prompt:f2")
    reft = vlreft.attach(model, vlreft.ReftConfig(das("question:l2", tied=True)))
    losses = {by_hand(model, reft, collator, rows, positions)[0] for positions in (None, "prompt:f2")}
    assert len(losses) == 2
    trainer = vlreft.ReftTrainer(model, arguments(tmp_path), data_collator=collator)
    found = float(trainer.compute_loss(model, collator(rows)).detach())
    assert found == pytest.approx(by_hand(model, reft, collator, rows, "prompt:f2")[0], rel=1e-5)
    seen, own = [], vlreft.Reft.sources
    monkeypatch.setattr(vlreft.Reft, "sources", lambda reft, *given: seen.append(given[1]) or own(reft, *given))
    interchange_accuracy(model, rows, collator, batch_size=4)
    assert seen == ["prompt:f2"] * 2


def answers_by_hand(model, reft, collator, rows, positions, num_tokens):
    model.eval()
    said = []
    for row in rows:
        batch = collator.prompts([row])
        with reft.sources(batch.pop("sources"), positions):
            ids = model.generate(**batch, max_new_tokens=num_tokens, do_sample=False)
        said.append(collator.decode(ids, batch["input_ids"].shape[1])[0])
    return said


@SETUPS
def test_training_evaluation_and_answers(setup, tmp_path):
    """Loss goes down, evaluation has the sources of its rows, and so have the answers."""
    model, collator, rows = setup()
    torch.manual_seed(1)
    reft = vlreft.attach(model, vlreft.ReftConfig(das("prompt:l3", layers=[1], rank=8)))
    seen = []

    def metrics(answers, examples):
        seen.append((answers, list(examples)))
        return {"length": sum(map(len, answers)) / len(answers)}

    trainer = vlreft.ReftTrainer(
        model,
        arguments(tmp_path, max_steps=12, learning_rate=0.1, lr_scheduler_type="constant"),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        answer_metrics=metrics,
        generation={"max_new_tokens": 3, "do_sample": False},
    )
    before = trainer.evaluate()
    losses = []
    for start in (0, 3):  # the evaluation's batches
        batch = collator(rows[start : start + 3])
        sources = batch.pop("sources")
        with torch.no_grad(), reft.sources(sources):
            losses.append(float(model(**batch).loss))
    assert before["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert seen[0][0] == answers_by_hand(model, reft, collator, rows, None, 3)
    with reft.disabled():
        batch = collator.prompts(rows)
        del batch["sources"]
        ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert collator.decode(ids, batch["input_ids"].shape[1]) != seen[0][0]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"] - 0.01
    assert trainer.predict_answers(rows) == answers_by_hand(model, reft, collator, rows, None, 3)


def test_a_loss_of_ones_own_is_computed_once(tmp_path):
    model, collator, rows = text_setup()
    reft = vlreft.attach(model, vlreft.ReftConfig(das()))
    calls = []

    class Own(vlreft.ReftTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            calls.append(sorted(inputs))
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            return loss + 1.0

    trainer = Own(model, arguments(tmp_path), data_collator=collator)
    plain, _ = by_hand(model, reft, collator, rows)
    model.eval()
    assert float(trainer.compute_loss(model, collator(rows)).detach()) == pytest.approx(plain + 1.0, rel=1e-5)
    assert len(calls) == 1


def test_sources_without_interventions_that_need_them(tmp_path):
    """A batch with sources trains a LoReFT as one without: nothing puts them in."""
    model, collator, rows = text_setup()
    vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", rank=2)))
    trainer = vlreft.ReftTrainer(model, arguments(tmp_path), train_dataset=rows, data_collator=collator)
    with_sources = float(trainer.compute_loss(model, collator(rows)).detach())
    assert with_sources == pytest.approx(float(trainer.compute_loss(model, collator.collator(rows)).detach()))


# A toy model whose answer is in four dimensions of sixteen ------------------------------------------------------------

NUM_WORDS, WIDTH, TRUE_WIDTH = 64, 16, 4


def toy():
    """One block that does nothing, and a head that reads the signs along four directions: 16 answers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_WORDS + 2**TRUE_WIDTH,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    directions_KD = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:TRUE_WIDTH]
    signs_CK = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=TRUE_WIDTH)))
    words_VD = torch.randn(config.vocab_size, WIDTH)
    along_VK = words_VD @ directions_KD.T
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(words_VD + (along_VK.sign() - along_VK) @ directions_KD)
        model.lm_head.weight.zero_()
        model.lm_head.weight[NUM_WORDS:] = 4 * signs_CK @ directions_KD
    return model.eval()


def toy_batches(model):
    """Return a collator of (base, source) words, and training and test pairs; the answer is the source's."""
    with torch.no_grad():
        answer_V = model(input_ids=torch.arange(NUM_WORDS)[:, None]).logits[:, 0].argmax(-1)

    def collate(pairs):
        base_B, source_B = torch.tensor(pairs).T
        ids_BL = torch.stack([base_B, answer_V[source_B]], 1)
        labels_BL = ids_BL.where(torch.tensor([False, True]), -100)
        return {"input_ids": ids_BL, "labels": labels_BL, "sources": {"input_ids": source_B[:, None]}}

    pairs = list(itertools.product(range(NUM_WORDS), repeat=2))
    random.Random(0).shuffle(pairs)
    return collate, pairs[:3000], pairs[3000:]


@torch.no_grad()
def toy_accuracy(model, reft, batch):
    model.eval()
    with reft.sources(batch["sources"]):
        said_B = model(input_ids=batch["input_ids"], prompt_mask=batch["labels"] < 0).logits[:, 0].argmax(-1)
    return float((said_B == batch["labels"][:, 1]).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_learned_width_is_the_true_one(seed, tmp_path):
    model = toy()
    collate, train, test = toy_batches(model)
    torch.manual_seed(seed)
    reft = vlreft.attach(model, vlreft.ReftConfig(das("prompt:l1", [0], "boundless_das")))
    (edit,) = reft.edits.values()
    settings = {"max_steps": 300, "per_device_train_batch_size": 64, "learning_rate": 3e-2, "seed": seed}
    vlreft.ReftTrainer(
        model,
        arguments(tmp_path, remove_unused_columns=False, **settings),
        train_dataset=train,
        data_collator=collate,
        callbacks=[BoundlessSchedule(0.5, start=2.0, end=0.1)],
    ).train()
    assert edit.num_dimensions == TRUE_WIDTH
    torch.testing.assert_close(edit.rotation @ edit.rotation.mT, torch.eye(WIDTH), atol=1e-4, rtol=0.0)
    assert toy_accuracy(model, reft, collate(test)) == 1.0
    with torch.no_grad():
        edit.boundary.fill_((TRUE_WIDTH - 1) / WIDTH)
    assert toy_accuracy(model, reft, collate(test)) < 0.9


def test_das_of_the_true_rank_and_of_one_less(tmp_path):
    accuracies = []
    for rank in (TRUE_WIDTH, TRUE_WIDTH - 1):
        model = toy()
        collate, train, test = toy_batches(model)
        torch.manual_seed(1)
        item = vlreft.Intervention("das", layers=0, positions="prompt:l1", rank=rank, init="reference")
        reft = vlreft.attach(model, vlreft.ReftConfig(item))
        settings = {"max_steps": 80, "per_device_train_batch_size": 64, "learning_rate": 3e-2}
        vlreft.ReftTrainer(
            model,
            arguments(tmp_path, remove_unused_columns=False, **settings),
            train_dataset=train,
            data_collator=collate,
        ).train()
        accuracies.append(toy_accuracy(model, reft, collate(test)))
    assert accuracies[0] > 0.99
    assert accuracies[1] < 0.9


def test_the_schedule_cools_and_charges_for_the_width(tmp_path):
    model = toy()
    collate, train, _ = toy_batches(model)
    reft = vlreft.attach(model, vlreft.ReftConfig(das("prompt:l1", [0], "boundless_das")))
    (edit,) = reft.edits.values()
    seen = []

    class Watch(vlreft.ReftTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(edit.temperature)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    penalty = 1000.0  # beside it the loss does not count
    Watch(
        model,
        arguments(tmp_path, max_steps=5, learning_rate=0.2, remove_unused_columns=False),
        train_dataset=train[:20],
        data_collator=collate,
        callbacks=[BoundlessSchedule(penalty, start=9.0, end=1.0)],
    ).train()
    assert seen == pytest.approx([9.0, 7.0, 5.0, 3.0, 1.0])
    assert float(edit.boundary.detach()) == pytest.approx(1 / WIDTH)
    assert edit.num_dimensions == 1


def test_what_the_schedule_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"`penalty` \(=-1\)"):
        BoundlessSchedule(-1)
    with pytest.raises(ValueError, match=r"`end` \(=0.0\)"):
        BoundlessSchedule(end=0.0)
    model, collator, rows = text_setup()
    vlreft.attach(model, vlreft.ReftConfig(das()))
    trainer = vlreft.ReftTrainer(
        model,
        arguments(tmp_path),
        train_dataset=rows,
        data_collator=collator,
        callbacks=[BoundlessSchedule()],
    )
    with pytest.raises(ValueError, match="no 'boundless_das' interventions"):
        trainer.train()


def test_a_saved_das_is_the_same(tmp_path):
    model, collator, rows = text_setup()
    torch.manual_seed(1)
    reft = vlreft.attach(model, vlreft.ReftConfig([das("prompt:l2", [1]), das("prompt:l1", [0], "boundless_das")]))
    batch = collator(rows)
    sources, labels = batch.pop("sources"), batch.pop("labels")
    with torch.no_grad(), reft.sources(sources):
        before = model(**batch, prompt_mask=labels < 0).logits
    reft.save_pretrained(tmp_path / "adapter")
    reft.detach()
    again = vlreft.load(model, tmp_path / "adapter")
    with torch.no_grad(), again.sources(sources):
        assert model(**batch, prompt_mask=labels < 0).logits.equal(before)
