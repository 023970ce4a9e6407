"""What `attach` and a training step refuse: one clear error each, and the model stays exactly as it was."""

import open_clip
import pytest
import torch
from tiny import (
    IMAGE_ID,
    half_frozen,
    image_batch,
    llama,
    shake,
    shared_llama,
    shared_llava,
    text_batch,
    untouched,
)
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache

import vlreft
from vlreft.running.streams import cache_name


def item(**settings):
    return vlreft.Intervention(**({"method": "loreft", "rank": 2, "positions": "l1"} | settings))


GOOD = vlreft.ReftConfig(item())

# model, settings of the intervention, text of the error
REFUSED = [
    (
        shared_llama,
        {"rank": 17},
        r"`rank` \(=17\) must be at most the hidden size \(=16\) of site 'text' layer 0; lower `rank`",
    ),
    (
        shared_llava,
        {"rank": 25, "site": "vision", "positions": "patches"},
        r"`rank` \(=25\) .*\(=24\) of site 'vision'",
    ),
    (
        shared_llava,
        {"rank": 17, "site": "connector", "positions": "image"},
        r"`rank` \(=17\) .*\(=16\) of site 'connector'",
    ),
    (shared_llama, {"layers": 3}, "layer 3 is out of range: site 'text' has 3 layers, 0 to 2"),
    (shared_llama, {"layers": [0, -4]}, "layer -4 is out of range: site 'text' has 3 layers, 0 to 2"),
    (shared_llama, {"layers": [2, -1]}, r"`layers` \(=\[2, -1\]\) names a layer of site 'text' twice"),
    (shared_llava, {"site": "vision", "positions": "patches", "layers": 4}, "site 'vision' has 4 layers, 0 to 3"),
    (shared_llava, {"site": "connector", "positions": "image", "layers": 1}, "site 'connector' has 1 layer, 0 to 0"),
    (shared_llama, {"site": "vision"}, r"LlamaForCausalLM has no site 'vision' \(no vision stack .*\); it has 'text'$"),
    (shared_llama, {"site": "connector"}, r"LlamaForCausalLM has no site 'connector' \(.*\); it has 'text'$"),
    (
        shared_llava,
        {"site": "audio"},
        "LlavaForConditionalGeneration has no site 'audio'; it has 'text', 'vision', 'connector', and every module",
    ),
    (
        shared_llama,
        {"positions": "image:f1"},
        r"'image:f1': site 'text' .*no segment 'image' \(its tokens are words alone\); it has 'prompt'",
    ),
    (
        shared_llama,
        {"positions": "patches"},
        r"no segment 'patches' \(its tokens are words alone\); it has 'prompt', 'text'",
    ),
    (
        shared_llava,
        {"positions": "cls"},
        r"site 'text' .*no segment 'cls'; it has 'prompt', 'text', 'question', 'response', 'image'$",
    ),
    (shared_llava, {"positions": "eos"}, r"site 'text' .*no segment 'eos'; it has"),
    (
        shared_llava,
        {"site": "vision", "positions": "image"},
        "site 'vision' .*no segment 'image'; it has 'prompt', 'cls', 'patches'$",
    ),
    (shared_llava, {"site": "connector", "positions": "l1"}, "site 'connector' .*no segment 'prompt'; it has 'image'$"),
    (
        shared_llava,
        {"site": "vision", "positions": "patches", "layers": 3},
        r"layer 3 .*can never matter: .*reads the output of layer 2 \(vision_feature_layer=-2\); use layers 0 to 2$",
    ),
    (
        shared_llava,
        {"site": "vision", "positions": "patches", "layers": [0, -1]},
        "layer -1 of site 'vision' can never matter",
    ),
]


@pytest.mark.parametrize(("make", "settings", "text"), REFUSED)
def test_attach_refuses(make, settings, text):
    model = make()
    config = vlreft.ReftConfig([item(), item(**settings)] if make is shared_llama else [item(**settings)])
    with half_frozen(model), untouched(model), pytest.raises(ValueError, match=text):
        vlreft.attach(model, config)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1a",
        "a.b",
        "a b",
        "a\n",
        "é",
        3,
        None,
        "keys",
        "forward",
        "training",
        "_modules",
        "runtime",
        "refts",
        "was_trainable",
    ],
)
def test_bad_names(name):
    model = shared_llama()
    with untouched(model), pytest.raises(ValueError, match=r"`name` .* must be letters, digits, '_' and '-'"):
        vlreft.attach(model, GOOD, name)


@pytest.mark.parametrize("name", ["default", "vlreft", "a-b_2"])
def test_good_names(name):
    reft = vlreft.attach(llama(), GOOD, name)
    assert reft.is_attached
    assert all(key.startswith(f"vlreft.{name}.") for key in reft.model.state_dict() if key.startswith("vlreft."))


@pytest.mark.parametrize("config", [None, item(), [item()], GOOD.to_dict(), "f4+l4"])
def test_other_configs(config):
    model = shared_llama()
    with untouched(model), pytest.raises(TypeError, match=r"`config` must be a vlreft\.ReftConfig, got"):
        vlreft.attach(model, config)


@pytest.mark.parametrize("model", [None, "llama"], ids=str)
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match="`model` must be a transformers or open_clip model, got"):
        vlreft.attach(model, GOOD)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())], ids=["one", "list"])
def test_a_model_that_is_no_transformer(model):
    with untouched(model), pytest.raises(ValueError, match=r"no list of transformer blocks .* was found"):
        vlreft.attach(model, GOOD)


def test_what_wraps_a_model_is_refused():
    """A wrapper's calls say less than the model's own: positions would be guessed."""
    wrapped = nn.Sequential(llama())
    with pytest.raises(
        ValueError, match=r"a Sequential wraps a transformers model: attach to that LlamaForCausalLM, `"
    ):
        vlreft.attach(wrapped, GOOD)


def test_an_open_clip_text_tower_has_no_image_tokens():
    tower = {"layers": 1, "width": 8, "head_width": 4, "patch_size": 4, "image_size": 8}
    model = open_clip.CLIP(4, tower, {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 2, "layers": 1})
    with (
        untouched(model),
        pytest.raises(ValueError, match=r"site 'text' of CLIP has no segment 'image' \(its tokens are"),
    ):
        vlreft.attach(model, vlreft.ReftConfig(item(positions="image:f1")))
    with untouched(model), pytest.raises(ValueError, match="CLIP has no site 'connector'"):
        vlreft.attach(model, vlreft.ReftConfig(item(site="connector", positions="image:f1")))


def test_a_model_with_no_text():
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = CLIPVisionModel(tower)
    with untouched(model), pytest.raises(ValueError, match="CLIPVisionModel"):
        vlreft.attach(model, vlreft.ReftConfig(item(site="text")))


def test_a_model_with_a_child_of_our_name():
    model = llama()
    model.vlreft = nn.Linear(2, 2)
    with untouched(model), pytest.raises(ValueError, match="vlreft"):
        vlreft.attach(model, GOOD)


def test_attaching_twice_under_one_name():
    model = llama()
    reft = shake(vlreft.attach(model, GOOD, "mine"))
    logits = model(**text_batch()).logits
    with (
        untouched(model),
        pytest.raises(ValueError, match="'mine' are attached already; detach them or choose another `name`"),
    ):
        vlreft.attach(model, vlreft.ReftConfig(item(rank=3)), "mine")
    assert reft.is_attached
    assert torch.equal(model(**text_batch()).logits, logits)


@pytest.mark.parametrize(("make", "settings", "text"), REFUSED)
def test_a_refused_second_set_leaves_the_first(make, settings, text):
    model = make()
    first = shake(vlreft.attach(model, GOOD))
    with untouched(model), pytest.raises(ValueError, match=text):
        vlreft.attach(model, vlreft.ReftConfig(item(**settings)), "second")
    first.detach()


def test_detached_interventions_say_so():
    reft = vlreft.attach(llama(), GOOD)
    reft.detach()
    assert not reft.is_attached
    for call in (reft.detach, lambda: reft.prompt(torch.ones(1, 2)).__enter__()):
        with pytest.raises(ValueError, match="'default' are not attached any more"):
            call()


# Forwards ------------------------------------------------------------------------------------------------------------


def labels(*rows):
    return {"labels": torch.tensor(rows), "input_ids": torch.full((len(rows), len(rows[0])), 3)}


REFUSED_BATCHES = {
    "no labels": (
        {"input_ids": torch.full((1, 4), 3)},
        "positions 'l1' need to know where the prompt ends.* neither `labels` nor a `prompt_mask`",
    ),
    "all masked": (
        labels([-100, -100, 5], [-100] * 3),
        "row 1 of the batch has no labelled token: every label is -100",
    ),
    "two answers": (
        labels([-100, 5, -100, 5]),
        "row 0 of the batch has 2 separate answers: .*give each answer a row of its own",
    ),
    "answer first": (
        labels([-100, 5], [5, 5]),
        "row 1 of the batch has no prompt token, .*: its labels start at the first token",
    ),
    "answer first, then more": (labels([5, -100, 5]), "row 0 of the batch has 2 separate answers"),
    "mask of another shape": (
        labels([-100, 5]) | {"attention_mask": torch.ones(1, 3)},
        r"`attention_mask` must have the shape of the tokens, \(1, 2\), got \(1, 3\)",
    ),
    "mask of the attention": (
        labels([-100, 5]) | {"attention_mask": torch.ones(1, 1, 2, 2)},
        r"`attention_mask` must have the shape of the tokens",
    ),
    "nothing": ({"labels": torch.ones(1, 2)}, "called without `input_ids` and `inputs_embeds`"),
}


@pytest.fixture
def training():
    model = llama()
    reft = shake(vlreft.attach(model, GOOD))
    return model.train(), reft


@pytest.mark.parametrize("name", REFUSED_BATCHES)
def test_training_refuses(name, training):
    batch, text = REFUSED_BATCHES[name]
    model, _ = training
    good = model(**text_batch()).loss
    with untouched(model), pytest.raises(ValueError, match=text):
        model(**batch)
    assert torch.equal(model(**text_batch()).loss, good)


def test_a_prompt_mask_is_enough(training):
    model, _ = training
    batch = text_batch()
    prompt_mask = batch["labels"] == -100
    assert torch.equal(model(input_ids=batch["input_ids"], prompt_mask=prompt_mask).logits, model(**batch).logits)
    assert torch.equal(model(**batch, prompt_mask=prompt_mask).logits, model(**batch).logits)


def test_a_prompt_mask_settles_several_answers(training):
    model, _ = training
    batch = labels([-100, 5, -100, 5])
    assert model(**batch, prompt_mask=torch.tensor([[True, False, False, False]])).loss.isfinite()


def test_no_prompt_end_is_needed_for_images_or_in_evaluation():
    model = shared_llava()
    reft = shake(vlreft.attach(model, vlreft.ReftConfig(item(positions="image:f1"))))
    try:
        model.train()
        model(**image_batch())
    finally:
        model.eval()
        reft.detach()
    model = llama()
    vlreft.attach(model, GOOD)
    model(input_ids=torch.full((1, 4), 3))


def test_a_disabled_adapter_refuses_nothing(training):
    model, reft = training
    with reft.disabled():
        for batch, _ in REFUSED_BATCHES.values():
            if "input_ids" in batch and batch.get("attention_mask", torch.ones(1, 1)).shape != (1, 3):
                model(**batch)


def test_continuing_a_cache_outside_of_generate():
    model = llama()
    reft = shake(vlreft.attach(model, GOOD))
    ids_BL, cache = text_batch()["input_ids"], DynamicCache(config=model.config)
    whole = model(input_ids=ids_BL[:, :6]).logits
    with reft.prompt(ids_BL[:, :6]):
        first = model(input_ids=ids_BL[:, :4], **{cache_name(model): cache})
    with (
        untouched(model),
        pytest.raises(ValueError, match=r"run it inside `with reft.prompt\(input_ids, attention_mask\):`"),
    ):
        model(input_ids=ids_BL[:, 4:6], **{cache_name(model): cache})
    with reft.prompt(ids_BL[:, :6]):
        second = model(input_ids=ids_BL[:, 4:6], **{cache_name(model): cache})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-5)


def test_blocks_called_without_the_model():
    model = llama()
    vlreft.attach(model, GOOD)
    h_BTD = torch.zeros(1, 4, 16)
    positions = model.model.rotary_emb(h_BTD, torch.arange(4)[None])
    blocks = nn.Sequential(*model.model.layers)
    blocks.forward = lambda h: [layer(h, position_embeddings=positions) for layer in blocks]  # pyright: ignore
    with pytest.raises(ValueError, match="outside of a call of the model itself"):
        blocks(h_BTD)


def test_an_inner_model_called_by_itself_is_edited_alike():
    model = llama()
    shake(vlreft.attach(model, GOOD))
    ids_BL = text_batch()["input_ids"]
    assert model.lm_head(model.model(input_ids=ids_BL).last_hidden_state).equal(model(input_ids=ids_BL).logits)
    with pytest.raises(ValueError, match="neither `labels` nor a `prompt_mask`"):
        model.train().model(input_ids=ids_BL)


@pytest.mark.parametrize("selects", ["l1", "uniform2", "[-2:]"])
def test_generate_refuses_what_decoding_cannot_know(selects):
    model = llama()
    vlreft.attach(model, vlreft.ReftConfig(item(positions=f"response:{selects}")))
    with untouched(model), pytest.raises(ValueError, match="needs the answer's length, which is unknown"):
        model.generate(torch.full((1, 4), 3), max_new_tokens=2, do_sample=False)


def test_image_positions_need_the_ids():
    model = shared_llava()
    reft = vlreft.attach(model, vlreft.ReftConfig(item(positions="image:f1")))
    embeds = model.get_input_embeddings()(torch.full((1, 4), IMAGE_ID - 1))
    try:
        with pytest.raises(ValueError, match=r"no segment 'image' here .*`input_ids`, which were not given"):
            model(inputs_embeds=embeds)
    finally:
        reft.detach()
