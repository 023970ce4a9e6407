"""The bases that tasks load: which class, which head has to be trained, how rows are answered."""

import pytest
import torch
from test_contrast import build, picture
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

import vlreft
from tasks.setups import ClassesSetup, GenerateSetup, Options, PairsSetup, SequenceSetup, untrained_modules
from tasks.table import TASKS

OPTIONS = Options("cpu", torch.float32)


def tiny_bert(**options):
    return BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **options
    )


@pytest.mark.parametrize(("has_pooler", "heads"), [(True, ("classifier",)), (False, ("bert.pooler", "classifier"))])
def test_what_the_checkpoint_lacks_is_trained(has_pooler, heads, tmp_path):
    BertModel(tiny_bert(), add_pooling_layer=has_pooler).save_pretrained(tmp_path)
    model, info = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    found = untrained_modules(model, info["missing_keys"])
    assert found == heads
    edit = vlreft.Intervention("loreft", positions="f1", rank=1)
    reft = vlreft.attach(model, vlreft.ReftConfig(edit, modules_to_save=found))
    assert reft.num_module_parameters() == sum(
        p.numel() for name, p in model.named_parameters() if name.startswith(heads) and "vlreft" not in name
    )


@pytest.mark.parametrize(
    ("task", "model", "kind"),
    [
        ("demo_code", "demo-llava", LlavaForConditionalGeneration),
        ("demo_lm_code", "demo-lm", LlamaForCausalLM),
        ("commonsense", "demo-llava", LlavaForConditionalGeneration),  # text alone, asked of a vision-language model
    ],
)
def test_the_class_follows_model_and_task(task, model, kind):
    setup = GenerateSetup(TASKS[task], f"assets/{model}", OPTIONS)
    assert type(setup.model) is kind
    assert not setup.model.training
    example = setup.examples(
        [{"id": "1", "question": "how many circles ?", "answer": "two", "label": "x"}], training=True
    )
    assert "how many circles ?" in example[0]["question"]


def test_the_prompt_is_the_tasks_or_the_users_and_braces_in_a_question_are_text():
    rows = [{"id": "1", "question": "what is {this} ?", "answer": "red"}]
    task = TASKS["vqav2"]
    ours = GenerateSetup(task, "assets/demo-llava", OPTIONS).examples(rows, training=True)[0]["question"]
    assert ours == "what is {this} ?\nAnswer the question using a single word or phrase."
    users = Options("cpu", torch.float32, prompt="say : {question}")
    assert GenerateSetup(task, "assets/demo-llava", users).examples(rows, training=True)[0]["question"] == (
        "say : what is {this} ?"
    )


def test_pairs_of_texts_are_two_segments_and_numbers_stay_numbers():
    setup = SequenceSetup(TASKS["glue_stsb"], "assets/demo-lm", OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained("assets/demo-lm")
    (example,) = setup.examples([{"text": "red", "text_pair": "blue", "answer": "3.8"}], training=True)
    assert example["input_ids"] == tokenizer("red", "blue")["input_ids"]
    assert example["labels"] == 3.8
    assert setup.model.config.num_labels == 1
    assert setup.heads == ("score",)
    assert "labels" not in setup.examples([{"text": "red", "text_pair": "", "answer": "1"}], training=False)[0]


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_dual_encoders_of_both_libraries_are_loaded_from_folders(kind, tmp_path):
    folder = "assets/demo-clip"
    if kind == "transformers":
        model, (processor,) = build("clip")
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        folder = str(tmp_path)
    classes = ClassesSetup(TASKS["fewshot"], folder, OPTIONS, ["red circle", "blue star"])
    assert isinstance(classes.model, CLIPModel) == (kind == "transformers")
    rows = [{"id": "1", "image": picture(0), "answer": "blue star", "text": "blue star", "image_id": "1"}]
    (example,) = classes.examples(rows, training=True)
    assert example["label"] == 1
    loss = classes.collator.loss(classes.model(**without_labels(classes.collator([example]))), torch.tensor([1]))
    assert torch.isfinite(loss)
    pairs = PairsSetup(TASKS["coco_retrieval"], folder, OPTIONS)
    assert "labels" in pairs.collator(list(pairs.examples(rows, training=True)))


def without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}
