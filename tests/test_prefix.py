"""Reusing the untouched prefix changes the cost of a training step and nothing else."""

import logging
from dataclasses import replace

import pytest
import torch
import transformers
from families_packed import ROWS as PACKED
from families_rows import GEMMA, GEMMA_IDS, GEMMAS, SIGLIP, _text, _tiny
from family import IMAGE, SAMPLES, TEXT_ONLY, Sample
from processors import tiny_llava_model, tiny_llava_processor, tiny_paligemma_model, tiny_paligemma_processor
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainingArguments
from zoo import FAMILIES, intervention, shake

import vlreft
from vlreft.reuse.kept import KeptPrefixes
from vlreft.reuse.prefix import PrefixReuse
from vlreft.running.streams import cache_name

TOLERANCE = 1e-6  # relative; transformers takes the loss in float32 whatever the model's precision
POSITIONS = ("question:l2", "prompt:l3", "response", "question:f1+l2")


def gradients(reft, loss):
    reft.model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in reft.parameters()]


def both_ways(model, reft, batch):
    """Return losses and gradients of the plain and of the cut step, and how many tokens the second one still has."""
    model.train()
    plain = model(**batch).loss
    plain_gradients = gradients(reft, plain)
    with PrefixReuse(reft, required=True).cut(batch) as rest:
        cut = model(**rest).loss
    cut_gradients = gradients(reft, cut)
    model.zero_grad(set_to_none=True)
    return plain, plain_gradients, cut, cut_gradients, rest["input_ids"].shape[1]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if "demo" not in f.name], ids=str)
def test_gradients_are_those_of_the_plain_step(attached, family, positions):
    samples = [SAMPLES[0]] * 2 if family.has_image else TEXT_ONLY
    if not family.has_image and positions.startswith("question:f1"):
        pytest.skip("the first token of a text-only prompt is edited: there is no prefix")
    model, reft = attached(family, intervention("loreft", positions=positions, layers="all"))
    # In float64, where another order of summation cannot be mistaken for another gradient.
    batch = {name: t.double() if t.is_floating_point() else t for name, t in family.batch(samples).items()}
    model.double()
    try:
        plain, plain_gradients, cut, cut_gradients, num_left = both_ways(model, reft, batch)
    finally:
        model.float()
    assert num_left < batch["input_ids"].shape[1]
    torch.testing.assert_close(cut, plain, rtol=TOLERANCE, atol=0)
    for ours, theirs in zip(cut_gradients, plain_gradients, strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"site": "vision", "positions": "patches"}, "edits image features"),
        ({"site": "connector", "positions": "image"}, "edits image features"),
        ({"positions": "image:l2"}, "edits image features"),
        ({"positions": "f2+l2"}, "edits the first tokens"),
        ({"positions": "text"}, "edits the first tokens"),
        ({"positions": "[:3]"}, "edits the first tokens"),
    ],
)
def test_says_which_intervention_forbids_it(attached, fields, reason, caplog):
    _, reft = attached("llava", intervention("loreft", positions="prompt:l1"), intervention("loreft", **fields))
    with pytest.raises(ValueError, match=rf"intervention 1 .*{reason}"):
        PrefixReuse(reft, required=True)
    with caplog.at_level(logging.INFO, "vlreft"):
        optional = PrefixReuse(reft, required=False)
    assert reason in caplog.text
    batch = FAMILIES["llava"].batch([SAMPLES[0]])
    with optional.cut(batch) as rest:
        assert rest == batch


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # PaliGemma's processor under NumPy 2
def test_attention_that_looks_ahead_is_found_out():
    processor = tiny_paligemma_processor()
    model = tiny_paligemma_model(processor).train()
    from PIL import Image

    rows = [
        {"image": Image.new("RGB", (28, 28), color), "question": "what is it", "answer": "a"}
        for color in ("red", "blue")
    ]
    batch = vlreft.Collator(processor)(rows)
    reft = shake(vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", positions="prompt:l1"))))
    with pytest.raises(ValueError, match="PaliGemma"), PrefixReuse(reft, required=True).cut(batch):
        pass
    plain = gradients(reft, model(**batch).loss)
    careful = PrefixReuse(reft, required=False)
    careful.refusal = ""
    with careful.cut(batch) as rest:
        assert all(a.equal(b) for a, b in zip(gradients(reft, model(**rest).loss), plain, strict=True))


def test_checkpointing_and_late_images_take_the_plain_step(attached):
    family = FAMILIES["llava"]
    model, reft = attached(family, intervention("loreft", positions="prompt:[1:2]"))
    batch = family.batch([SAMPLES[0]] * 2)
    with (
        pytest.raises(ValueError, match="an image stands behind column 1"),
        PrefixReuse(reft, required=True).cut(batch),
    ):
        pass
    with PrefixReuse(reft, required=False).cut(batch) as rest:
        assert rest == batch
    model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing"), PrefixReuse(reft, required=True).cut(batch):
        pass
    model.activation_checkpointing_disable()


def forgetful():
    """A Llama that reads its cache in evaluation only."""
    model = FAMILIES["llama"].build()
    name = cache_name(model)

    def forget(module, args, kwargs):
        return args, {**kwargs, name: None, "position_ids": None} if module.training else kwargs

    model.model.register_forward_pre_hook(forget, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    ("family", "build", "reason"),
    [
        pytest.param(FAMILIES["llama"], forgetful, "run on tokens 0 to 5 while the batch has 7", id="forgetful"),
        *(
            pytest.param(row, row.build, "modified by an inplace operation", id=row.name)
            for row in PACKED
            if row.name == "qwen3_5"
        ),
    ],
)
def test_models_that_run_from_a_cache_only_without_training(family, build, reason, monkeypatch):
    """One drops its cache in training, the other writes into states that the backward pass needs."""
    model = build().train()
    reft = shake(vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", positions="question:l2"))))
    batch = family.batch([SAMPLES[0] if family.has_image else SAMPLES[1]])
    with pytest.raises(ValueError, match=reason), PrefixReuse(reft, required=True).cut(batch):
        pass
    plain = gradients(reft, model(**batch).loss)
    monkeypatch.setattr("vlreft.reuse.prefix.WORTHWHILE", 1)
    careful = PrefixReuse(reft, required=False)
    with careful.cut(batch) as rest:
        assert rest == batch
        assert all(a.equal(b) for a, b in zip(gradients(reft, model(**rest).loss), plain, strict=True))


def test_batches_with_and_without_images_are_tried_apart(attached):
    family = FAMILIES["qwen2_5_vl"]
    model, reft = attached(family, intervention("loreft", positions="prompt:l2"))
    model.train()
    reuse = PrefixReuse(reft, required=True)
    for samples in (TEXT_ONLY, [SAMPLES[0]] * 2, [SAMPLES[0]] * 2):
        with reuse.cut(family.batch(samples)) as rest:
            model(**rest).loss.backward()
    assert len(reuse.tried) == 2
    model.zero_grad(set_to_none=True)


# Rows that share a prefix, and prefixes that are kept -----------------------------------------------------------------

ABOUT_ONE_PICTURE = (
    SAMPLES[0],
    Sample((5, 8, IMAGE, 13, 12, 16), (22,)),
    Sample((5, 8, IMAGE, 11, 17, 12, 18, 19), (20, 21, 23)),
)
TWO_PICTURES = (SAMPLES[0], Sample((6, 17, IMAGE, 18, 9), (22, 23, 24)), ABOUT_ONE_PICTURE[1])
OTHER_WORDS = (SAMPLES[1], SAMPLES[1], Sample((5, 11, 12, 13, 14, 15), (20, 21)))
# What is in a batch, how many different prefixes that is, and which families read it.
BATCHES = {
    "one picture": (ABOUT_ONE_PICTURE, 1),
    "two pictures": (TWO_PICTURES, 2),
    "with and without": (SAMPLES, 3),
    "text": (OTHER_WORDS, 2),
}


def _gemma3():
    """Gemma 3 with a window of six tokens: it forgets the beginning of each prefix."""
    text = {**GEMMA, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return _tiny(
        transformers.Gemma3ForConditionalGeneration,
        transformers.Gemma3Config,
        text_config=_text("gemma3_text", **text),
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        **GEMMA_IDS,
    )()


GEMMA3 = replace(next(row for row in GEMMAS if row.name == "gemma3"), build=_gemma3)
SHARING = [FAMILIES[name] for name in ("llama", "gpt2", "llava", "qwen2_5_vl")] + [GEMMA3]


@pytest.fixture(scope="module")
def gemma3():
    return _gemma3()


@pytest.mark.parametrize("kept", [None, "1GB"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("family", "content"),
    [
        pytest.param(family, content, id=f"{family}-{content}")
        for family in SHARING
        for content in BATCHES
        if family.has_image or content == "text"
    ],
)
def test_shared_and_kept_prefixes_give_the_plain_gradients(attached, gemma3, family, content, side, kept):
    samples, num_different = BATCHES[content]
    lent = gemma3 if family is GEMMA3 else None
    model, reft = attached(family, intervention("loreft", positions="question:l2", layers="all"), model=lent)
    batch = {name: t.double() if t.is_floating_point() else t for name, t in family.batch(samples, side=side).items()}
    if side == "left" and family.name != "qwen2_5_vl":  # otherwise pads count, and no prefix is where another one is
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model.double().train()
    reuse = PrefixReuse(reft, required=True, kept=None if kept is None else KeptPrefixes(kept))
    try:
        plain = gradients(reft, model(**batch).loss)
        with reuse.cut(batch):  # the first one tries
            pass
        before = reuse.num_run
        with reuse.cut(batch) as rest:
            cut = gradients(reft, model(**rest).loss)
        assert rest["input_ids"].shape[1] < batch["input_ids"].shape[1]
        assert reuse.num_run - before == (num_different if kept is None else 0)
        for ours, theirs in zip(cut, plain, strict=True):
            assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()
    finally:
        model.float()
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("without", ["attention_mask", "labels"])
def test_a_batch_that_says_too_little_takes_the_plain_step(attached, without):
    _, reft = attached("llama", intervention("loreft", positions="prompt:l2"))
    batch = FAMILIES["llama"].batch(TEXT_ONLY)
    del batch[without]
    with PrefixReuse(reft, required=False).cut(batch) as rest:
        assert rest == batch
    with pytest.raises(ValueError, match="a batch must have"), PrefixReuse(reft, required=True).cut(batch):
        pass


# What is lost anyway --------------------------------------------------------------------------------------------------


def steps_of(model, reft, batch, num=2):
    """Take steps behind a reused prefix; return how often the last block's MLP ran, the logits' shape and gradients."""
    runs, mlp = [], FAMILIES["llama"].blocks(model, "text")[-1].mlp
    handle = mlp.register_forward_hook(lambda *_: runs.append(0))
    reuse = PrefixReuse(reft, required=True)
    model.train()
    with reuse.cut(batch):  # the first one tries
        pass
    try:
        for _ in range(num):
            runs.clear()
            with reuse.cut(batch) as rest:
                output = model(**rest)
            found = gradients(reft, output.loss)
    finally:
        handle.remove()
        model.zero_grad(set_to_none=True)
    return len(runs), tuple(output.logits.shape[:2]), found


LONG = {
    "input_ids": torch.randint(3, 30, (2, 60), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(2, 60, dtype=torch.long),
}
LONG["labels"] = LONG["input_ids"].clone()
LONG["labels"][:, :-4] = -100


@pytest.mark.parametrize("where", ["output", "mlp"])
@pytest.mark.parametrize("must", ["", "run to the end", "count logits"])
def test_a_prefix_ends_with_its_last_keys_and_only_labels_have_logits(attached, where, must):
    model, reft = attached("llama", intervention("loreft", positions="prompt:l7", layers="all", component=where))
    plain = gradients(reft, model.train()(**LONG).loss)
    if must == "run to the end":  # such a hook would not give the block's weights back
        model.model.layers[1].__dict__["_hf_hook"] = None
    handle = model.register_forward_pre_hook(count_logits, with_kwargs=True) if must == "count logits" else None
    try:
        num_runs, shape, found = steps_of(model, reft, LONG)
    finally:
        model.model.layers[1].__dict__.pop("_hf_hook", None)
        if handle is not None:
            handle.remove()
    assert num_runs == (2 if must else 1)
    assert shape == (2, 11 if must == "count logits" else 5)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def count_logits(_module, args, kwargs):
    """Refuse columns where a model wants a number of logits."""
    if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
        raise TypeError("`logits_to_keep` must be a number")
    return args, kwargs


def test_a_loss_that_reads_the_prefix_too_takes_the_plain_step(attached):
    """As a router's, which is a mean over all tokens."""
    model, reft = attached("llama", intervention("loreft", positions="prompt:l7"))
    model.train()

    def add_a_mean(_module, _args, kwargs, output):
        if output.loss is not None:
            output.loss = output.loss + model.get_input_embeddings()(kwargs["input_ids"]).square().mean()

    handle = model.register_forward_hook(add_a_mean, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match="another loss"), PrefixReuse(reft, required=True).cut(LONG):
            pass
    finally:
        handle.remove()
    with PrefixReuse(reft, required=True).cut(LONG) as rest:
        assert rest["input_ids"].shape[1] == 11


def saved_bytes(run):
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def test_keeps_less_for_the_backward_pass(attached):
    model, reft = attached("llama", intervention("loreft", positions="prompt:l2"))
    batch = {"input_ids": torch.randint(3, 30, (2, 400)), "attention_mask": torch.ones(2, 400, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-4] = -100
    model.train()
    plain = saved_bytes(lambda: model(**batch).loss)
    with PrefixReuse(reft, required=True).cut(batch) as rest:
        assert saved_bytes(lambda: model(**rest).loss) < plain / 4


def train(tmp_path, reuse_prefix, **more):
    processor = tiny_llava_processor(image_size=84)  # 36 image tokens
    model = tiny_llava_model(processor)
    torch.manual_seed(0)
    reft = vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", positions="question:l3", init="reference")))
    from PIL import Image

    rows = [
        {"image": Image.new("RGB", (84, 84), (20 * i, 0, 9)), "question": "what is it", "answer": "ab" * (i % 3 + 1)}
        for i in range(6)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = vlreft.ReftTrainer(model, arguments, vlreft.Collator(processor), rows, reuse_prefix=reuse_prefix)
    loss = trainer.train().training_loss
    return loss, [parameter.detach().clone() for parameter in reft.parameters()]


def test_a_compiled_run_takes_the_plain_step(tmp_path):
    with pytest.raises(ValueError, match="torch_compile"):
        train(tmp_path, reuse_prefix=True, torch_compile=True, torch_compile_backend="eager")


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 2}], ids=str)
def test_trainer_learns_the_same(tmp_path, more, caplog):
    loss, plain = train(tmp_path, reuse_prefix=False, **more)
    with caplog.at_level(logging.INFO, "vlreft"):
        reused_loss, reused = train(tmp_path, reuse_prefix="auto", **more)
    assert "reusing the prefix" in caplog.text
    assert reused_loss == pytest.approx(loss, rel=1e-5)
    for ours, theirs in zip(reused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
