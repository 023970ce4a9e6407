"""Batches, losses and zero-shot of dual encoders, on tiny models of both libraries, against the libraries' own."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from PIL import Image
from processors import text_tokenizer
from tokenizers import processors
from torch import nn
from torch.nn import functional
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, Resize, ToTensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    Trainer,
    TrainingArguments,
)

import vlreft
from vlreft.data.contrast import ClassCollator, PairCollator, contrastive_loss, zero_shot

ROOT = Path(__file__).resolve().parent.parent
SIDE, CONTEXT, END = 28, 32, 28
CLASSES = ("circle", "blue square", "red circle")
TEMPLATES = ("a {}", "the picture: a {}")
PREPROCESS = Compose([Resize((SIDE, SIDE)), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ALL = ("open_clip", "open_clip dict", "open_clip bias", "clip", "siglip")


def picture(seed):
    rng = random.Random(seed)
    return Image.new("RGB", (20, 20), tuple(rng.randrange(256) for _ in range(3)))


def pairs(number):
    return [{"image": picture(i), "text": f"{CLASSES[i % 3]} {'yes ' * i}"} for i in range(number)]


def examples(number):
    return [{"image": picture(i), "label": i % 3} for i in range(number)]


def tokenize(texts):
    rows = [[*(1 + ord(letter) % 26 for letter in text[: CONTEXT - 1]), END] for text in texts]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])


def hub_tokenizer():
    tokenizer = text_tokenizer()
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def open_clip_model(bias=None, as_dict=False):
    return open_clip.CustomTextCLIP(
        16,
        vision_cfg={"layers": 2, "width": 24, "head_width": 12, "patch_size": 14, "image_size": SIDE},
        text_cfg={"context_length": CONTEXT, "vocab_size": 32, "width": 24, "heads": 2, "layers": 2, "eos_id": END}
        | {"pool_type": "eos"},
        init_logit_bias=bias,
        output_dict=as_dict,
    )


def hub_sizes(tokenizer):
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "pad_token_id": tokenizer.pad_token_id}
    ids = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"text_config": SIZES | text | ids, "vision_config": SIZES | {"image_size": SIDE, "patch_size": 14}}


def build(kind):
    """Return a model and what its collators take."""
    torch.manual_seed(0)
    if kind.startswith("open_clip"):
        model = open_clip_model(bias=-3.0 if kind.endswith("bias") else None, as_dict=kind.endswith("dict"))
        return model.eval(), (PREPROCESS, tokenize)
    tokenizer, side = hub_tokenizer(), {"height": SIDE, "width": SIDE}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(**hub_sizes(tokenizer), projection_dim=16))
        images = CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False)
        return model.eval(), (CLIPProcessor(images, tokenizer),)
    model = SiglipModel(SiglipConfig(**hub_sizes(tokenizer)))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model.eval(), (SiglipProcessor(SiglipImageProcessor(size=side), tokenizer),)


@pytest.fixture(params=ALL)
def case(request):
    return build(request.param)


def features(model, images, texts, takes):
    """Return unit vectors of pictures and texts, and the scale, by the libraries' own routes."""
    if len(takes) == 2:
        image = model.encode_image(torch.stack([PREPROCESS(image) for image in images]), normalize=True)
        return image, model.encode_text(tokenize(texts), normalize=True), model.logit_scale.exp()
    processor = takes[0]
    image = model.get_image_features(**processor(images=images, return_tensors="pt"))
    options = {"padding": "max_length", "max_length": CONTEXT, "truncation": True, "return_tensors": "pt"}
    text = model.get_text_features(**processor(text=texts, **options))
    unit = [functional.normalize(part.pooler_output, dim=-1) for part in (image, text)]
    return *unit, model.logit_scale.exp()


def call(model, batch):
    return model(**{key: value for key, value in batch.items() if key != "labels"})


# Batches -------------------------------------------------------------------------------------------------------------


def test_pairs_are_what_the_libraries_make(case):
    model, takes = case
    rows = pairs(3)
    batch = PairCollator(*takes)(rows)
    assert batch["labels"].tolist() == [0, 1, 2]
    outputs = call(model, batch)
    image, text, _ = features(model, [row["image"] for row in rows], [row["text"] for row in rows], takes)
    if len(takes) == 1:
        ours = outputs.image_embeds, outputs.text_embeds
    else:
        ours = list(outputs.values() if isinstance(outputs, dict) else outputs)[:2]
    torch.testing.assert_close(ours[0], image)
    torch.testing.assert_close(ours[1], text)


def test_rows_may_have_captions_paths_and_other_columns(tmp_path):
    picture(1).save(tmp_path / "1.png")
    collator = PairCollator(PREPROCESS, tokenize)
    batch = collator([{"image": tmp_path / "1.png", "caption": "a red circle", "id": 7}])
    expected = collator([{"image": picture(1), "text": "a red circle"}])
    assert batch["image"].equal(expected["image"])
    assert batch["text"].equal(expected["text"])


def test_prompts_of_all_classes_go_with_every_batch(case):
    model, takes = case
    collator = ClassCollator(*takes, classes=CLASSES, templates=TEMPLATES)
    batch = collator(examples(4))
    assert batch["labels"].tolist() == [0, 1, 2, 0]
    assert "return_loss" not in batch
    key = "text" if len(takes) == 2 else "input_ids"
    assert len(batch[key]) == len(CLASSES) * len(TEMPLATES)
    parts = list(collator.prompts(4))
    assert [len(part[key]) for part in parts] == [4, 2]
    assert torch.cat([part[key] for part in parts]).equal(batch[key])
    assert call(model, batch) is not None


def test_longest_padding_gives_the_same_where_it_is_masked():
    model, (processor,) = build("clip")
    full, short = (PairCollator(processor, padding=padding)(pairs(2)) for padding in ("max_length", "longest"))
    assert full["input_ids"].shape[1] == CONTEXT > short["input_ids"].shape[1]
    torch.testing.assert_close(call(model, full).text_embeds, call(model, short).text_embeds)


# Losses --------------------------------------------------------------------------------------------------------------


def test_contrastive_loss_is_the_models_own(case):
    model, takes = case
    batch = PairCollator(*takes)(pairs(4))
    outputs = call(model, batch)
    loss = contrastive_loss(outputs, batch["labels"])
    if len(takes) == 1:
        assert loss.equal(outputs.loss)
    else:
        image, text = model.encode_image(batch["image"], True), model.encode_text(batch["text"], True)
        if model.logit_bias is None:
            expected = ClipLoss()(image, text, model.logit_scale.exp())
        else:
            expected = SigLipLoss()(image, text, model.logit_scale.exp(), model.logit_bias)
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(PairCollator.loss(outputs, batch["labels"], 8), loss / 2)


@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES])
def test_classification_loss_is_that_of_the_mean_over_templates(case, templates):
    model, takes = case
    collator = ClassCollator(*takes, classes=CLASSES, templates=templates)
    rows = examples(5)
    batch = collator(rows)
    outputs = call(model, batch)
    vectors = []
    for name in CLASSES:
        texts = [template.format(name) for template in templates]
        image, text, scale = features(model, [row["image"] for row in rows], texts, takes)
        vectors.append(functional.normalize(text.mean(0), dim=-1))
    logits = scale * image @ torch.stack(vectors).T
    torch.testing.assert_close(collator.logits(outputs), logits, rtol=1e-3, atol=1e-3)
    expected = functional.cross_entropy(logits, batch["labels"])
    torch.testing.assert_close(collator.loss(outputs, batch["labels"]), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        collator.loss(outputs, batch["labels"], torch.tensor(10)), expected / 2, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("what", [PairCollator, ClassCollator])
def test_trainer_trains_and_evaluates(tmp_path, kind, what):
    model, takes = build(kind)
    collator = PairCollator(*takes) if what is PairCollator else ClassCollator(*takes, classes=CLASSES)
    rows = pairs(8) if what is PairCollator else examples(8)
    columns = {"remove_unused_columns": False, "label_names": ["labels"]}  # ReftTrainer says so by itself
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=4, num_train_epochs=6, learning_rate=1e-3, **columns),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        compute_loss_func=collator.loss,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def arguments(folder, **more):
    quiet = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(str(folder), **quiet, **more)


def test_accumulated_batches_count_as_one(tmp_path):
    """Batches of 2, 2 and 1 give the gradient of one batch of 5."""
    gradients = []
    for size, steps in ((5, 1), (2, 3)):
        model, takes = build("open_clip")
        collator = ClassCollator(*takes, classes=CLASSES)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
        trainer = Trainer(
            model=model.train(),
            args=arguments(tmp_path, max_steps=1, **options),
            train_dataset=examples(5),
            data_collator=collator,
            compute_loss_func=collator.loss,
            optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
        )
        start = model.visual.proj.detach().clone()
        trainer.train()
        gradients.append(start - model.visual.proj.detach())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


# Zero-shot -----------------------------------------------------------------------------------------------------------


def test_zero_shot_is_the_logits_of_a_batch_whatever_its_size(case):
    model, takes = case
    collator = ClassCollator(*takes, classes=CLASSES, templates=TEMPLATES)
    rows = examples(5)
    model.train()
    found = zero_shot(model, rows, collator, batch_size=2)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = collator.logits(call(model, collator(rows)))
    torch.testing.assert_close(found.logits_BC, logits, rtol=1e-3, atol=1e-3)
    assert found.predictions.equal(logits.argmax(-1))
    assert found.accuracy == pytest.approx((logits.argmax(-1) == torch.tensor([0, 1, 2, 0, 1])).float().mean().item())
    torch.testing.assert_close(
        zero_shot(model, rows[:1], collator, batch_size=1).logits_BC, logits[:1], rtol=1e-3, atol=0
    )


def test_zero_shot_agrees_with_open_clips_classifier():
    model, takes = build("open_clip")
    collator = ClassCollator(*takes, classes=CLASSES, templates=TEMPLATES)
    rows = examples(4)
    classifier = open_clip.build_zero_shot_classifier(model, tokenize, CLASSES, TEMPLATES)
    with torch.no_grad():
        image = model.encode_image(torch.stack([PREPROCESS(row["image"]) for row in rows]), normalize=True)
    expected = model.logit_scale.exp() * image @ classifier
    torch.testing.assert_close(zero_shot(model, rows, collator).logits_BC, expected)


def test_zero_shot_needs_no_labels_but_accuracy_does():
    model, takes = build("open_clip")
    found = zero_shot(model, [{"image": picture(0)}], ClassCollator(*takes, classes=CLASSES))
    assert len(found.predictions) == 1
    with pytest.raises(ValueError, match="the rows have no `label`"):
        _ = found.accuracy


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, r"`classes` \(=\[\]\) must be a list of at least two names"),
        ({"classes": "circle"}, "`classes` .* must be a list"),
        ({"classes": ["circle", ""]}, "`classes` has '' at place 1"),
        ({"classes": ["circle", "square", "circle"]}, "`classes` has 'circle' twice"),
        (
            {"templates": ["a photo of a very small {}"], "tokenize": lambda t: tokenize(t)[:, :9]},
            "give the same tokens",
        ),
        ({"templates": []}, "`templates` .* must be a list of at least one text"),
        ({"templates": "a {}"}, "`templates` .* must be a list"),
        ({"templates": ["a {}", "a photo"]}, "`templates` has 'a photo'; put {} where"),
        ({"padding": "left"}, "`padding` .* must be 'max_length' or 'longest'"),
        ({"tokenize": None}, "`preprocess` .* is no transformers processor, so `tokenize` must be given"),
        ({"preprocess": "processor"}, "a processor has its own tokenizer; leave `tokenize` out"),
    ],
)
def test_bad_settings_are_refused(options, message):
    settings = {"preprocess": PREPROCESS, "tokenize": tokenize, "classes": CLASSES, **options}
    if settings["preprocess"] == "processor":
        settings["preprocess"] = build("clip")[1][0]
    with pytest.raises(ValueError, match=message):
        ClassCollator(**settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": picture(0)}, r"row 1 of the batch has the label None; .* from 0 to 2"),
        ({"image": picture(0), "label": 3}, "row 1 of the batch has the label 3"),
        ({"image": picture(0), "label": -1}, "row 1 of the batch has the label -1"),
        ({"image": picture(0), "label": True}, "row 1 of the batch has the label True"),
        ({"image": picture(0), "label": "circle"}, "row 1 of the batch has the label 'circle'"),
        ({"label": 0}, r"row 1 of the batch has the keys \['label'\] and no image; .* remove_unused_columns=False"),
        ({"image": "absent.png", "label": 0}, "row 1 of the batch has an image that cannot be read: 'absent.png'"),
        ((picture(0), 0), r"row 1 of the batch \(a tuple\) must be a mapping"),
    ],
)
def test_bad_rows_are_named(row, message):
    collator = ClassCollator(PREPROCESS, tokenize, classes=CLASSES)
    with pytest.raises(ValueError, match=message):
        collator([examples(1)[0], row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": picture(0)}, "row 0 of the batch has the text None; under `text` or `caption`"),
        ({"image": picture(0), "text": " "}, "row 0 of the batch has the text ' '"),
        ({"image": picture(0), "caption": ["a", "b"]}, r"row 0 of the batch has the text \['a', 'b'\]"),
        ({"text": "a circle"}, "row 0 of the batch has the keys .* and no image"),
    ],
)
def test_bad_pairs_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        PairCollator(PREPROCESS, tokenize)([row])


def test_zero_shot_names_rows_of_the_data():
    model, takes = build("open_clip")
    collator = ClassCollator(*takes, classes=CLASSES)
    with pytest.raises(ValueError, match="row 3 has an image that cannot be read"):
        zero_shot(model, [*examples(3), {"image": "absent.png", "label": 0}], collator, batch_size=2)
    with pytest.raises(ValueError, match="row 3 has the label None"):
        zero_shot(model, [*examples(3), {"image": picture(0)}], collator, batch_size=2)
    with pytest.raises(ValueError, match=r"row 3 \(a tuple\) must be a mapping"):
        zero_shot(model, [*examples(3), (picture(0), 0)], collator, batch_size=2)
    with pytest.raises(ValueError, match="must hold at least one row"):
        zero_shot(model, [], collator)
    assert not model.training


def test_one_pair_has_nothing_to_contrast_with(case):
    model, takes = case
    outputs = call(model, PairCollator(*takes)(pairs(1)))
    with pytest.raises(ValueError, match=r"a batch of 1 pair .*dataloader_drop_last=True"):
        contrastive_loss(outputs)


def test_losses_refuse_what_is_not_theirs(case):
    model, takes = case
    outputs = call(model, ClassCollator(*takes, classes=CLASSES)(examples(2)))
    with pytest.raises(ValueError, match="a text for each picture, got 3 texts for 2 pictures"):
        contrastive_loss(outputs)
    if len(takes) == 1:
        batch = PairCollator(*takes)(pairs(2))
        del batch["return_loss"]
        with pytest.raises(ValueError, match="call the model with `return_loss=True`"):
            contrastive_loss(call(model, batch))


@pytest.mark.parametrize("outputs", [{"loss": torch.zeros(())}, (torch.zeros(2, 3),), None])
def test_other_outputs_are_refused(outputs):
    with pytest.raises(ValueError, match="are not those of a dual encoder"):
        contrastive_loss(outputs)


@pytest.mark.slow
def test_open_clip_comes_when_it_is_needed():
    code = "import sys, vlreft.data.contrast; print('open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_losses_reach_both_sides(case):
    model, takes = case
    for collator, rows in ((PairCollator(*takes), pairs(3)), (ClassCollator(*takes, classes=CLASSES), examples(3))):
        model.zero_grad()
        batch = collator(rows)
        collator.loss(call(model, batch), batch["labels"]).backward()
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.Conv2d)]
        assert all(module.weight.grad is not None for module in embeddings if module.weight.shape[0] > 5)


# With interventions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("what", [PairCollator, ClassCollator])
def test_reft_trains_and_comes_back(tmp_path, kind, what):
    """Edits in both towers are trained, zero-shot runs through them, and a saved adapter gives the same again."""
    model, takes = build(kind)
    classes = ClassCollator(*takes, classes=CLASSES)
    collator, rows = (PairCollator(*takes), pairs(8)) if what is PairCollator else (classes, examples(8))
    config = vlreft.ReftConfig(
        vlreft.Intervention("loreft", site=site, positions="prompt", rank=2) for site in ("vision", "text")
    )
    model.requires_grad_(False)  # torch's linear maps round otherwise where weights are trainable
    base = zero_shot(model, examples(6), classes).logits_BC
    reft = vlreft.attach(model, config)
    torch.testing.assert_close(zero_shot(model, examples(6), classes).logits_BC, base, rtol=1e-3, atol=1e-3)
    trainer = vlreft.ReftTrainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=4, num_train_epochs=6, learning_rate=1e-2),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        compute_loss_func=collator.loss,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    model.eval()
    trained = zero_shot(model, examples(6), classes).logits_BC
    assert (trained - base).abs().max() > 1e-3
    with reft.disabled():
        assert zero_shot(model, examples(6), classes).logits_BC.equal(base)
    reft.save_pretrained(tmp_path / "adapter")
    fresh, _ = build(kind)
    vlreft.load(fresh, tmp_path / "adapter")
    assert zero_shot(fresh, examples(6), classes).logits_BC.equal(trained)


def test_batches_of_zero_shot_do_not_matter_with_interventions(case):
    model, takes = case
    collator = ClassCollator(*takes, classes=CLASSES, templates=TEMPLATES)
    edits = [vlreft.Intervention("loreft", site=site, positions="f1+l1", rank=2) for site in ("vision", "text")]
    reft = vlreft.attach(model, vlreft.ReftConfig(edits))
    for parameter in reft.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        logits = collator.logits(call(model, collator(examples(5))))
    found = zero_shot(model, examples(5), collator, batch_size=2)
    torch.testing.assert_close(found.logits_BC, logits, rtol=1e-3, atol=1e-3)


# The demo model and the example --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("domain", "low", "high"), [("filled", 0.98, 1.0), ("lines", 0.2, 0.5)])
def test_demo_clip_knows_filled_shapes_and_not_line_drawings(tmp_path, monkeypatch, domain, low, high):
    monkeypatch.chdir(tmp_path)
    name = f"local-dir:{ROOT / 'assets' / 'demo-clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    folder = ImageFolder(str(ROOT / "assets" / "demo-clip-data" / domain / "test"))
    rows = [{"image": path, "label": label} for path, label in folder.samples[::4]]
    classes = [name.replace("_", " ") for name in folder.classes]
    collator = ClassCollator(preprocess, open_clip.get_tokenizer(name), classes=classes, templates=["a {}"])
    assert low <= zero_shot(model.eval(), rows, collator).accuracy <= high


@pytest.mark.slow
def test_example_learns_line_drawings_and_keeps_filled_shapes(tmp_path):
    command = [sys.executable, "examples/finetune_clip.py", "--seconds", "8", "--output", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "classifies 640 of 640 pictures as before saving" in done.stdout
    assert (tmp_path / "finetune_clip.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    runs = {run["method"]: run for run in results["runs"]}
    assert runs.keys() == {"LoReFT", "LoRA", "linear probe"}
    assert results["zero_shot"]["test"] < 0.5
    assert runs["LoReFT"]["test"] > 0.65
    assert runs["LoReFT"]["original"] > 0.85
    assert runs["LoReFT"]["num_trained"] == 4112
