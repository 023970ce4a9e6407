"""The same laws on an accelerator: `pytest -m gpu`; what does not need CUDA runs with VLREFT_TEST_DEVICE=cpu too.

Where two devices are compared they compute in float64, where another order of summation is not mistaken for another
result; in float32 and bfloat16 too, with the room that these need. Shape suffixes: B = rows, L = tokens, T = tokens of
a state, E = width of an embedding.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import families_dual
import families_open_clip
import families_packed
import pytest
import torch
import torch.nn.functional as F
from family import SAMPLES, TEXT_ONLY, WITH_IMAGES, Family
from PIL import Image
from processors import tiny_llava_model, tiny_llava_processor
from test_prefix import ABOUT_ONE_PICTURE, gradients
from test_questions import ABOUT_IMAGES
from torch import Tensor
from transformers import CompileConfig, TrainingArguments
from zoo import FAMILIES, INTERVENTIONS, intervention, shake

import vlreft
from vlreft.reft import find_refts
from vlreft.reuse.features import FeatureCache
from vlreft.reuse.kept import KeptPrefixes
from vlreft.reuse.prefix import PrefixReuse
from vlreft.reuse.questions import SharedPrefixes

DEVICE = os.environ.get("VLREFT_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="is about CUDA alone")

MORE = {
    family.name: family for rows in (families_dual, families_open_clip, families_packed) for family in rows.ROWS
} | FAMILIES
DUAL = ("clip", "siglip", "open-clip", "open-clip-siglip")
GENERATIVE = ("llama", "gpt2", "llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
by_family = pytest.mark.parametrize("family", [MORE[name] for name in (*GENERATIVE, *DUAL)], ids=str)
POSITIONS = {"text": "f1+l2", "vision": "patches", "connector": "image"}
TEXT = {"positions": "question:l2", "layers": "all"}
# Transformers' check that image tokens and features are as many, which torch 2.11 does not compile.
WITHOUT_CHECKS = ("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
LEARNING = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Convolutions on CUDA round their inputs to ten bits unless they are told not to."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch._dynamo.reset()


def everywhere(family: Family, method: str = "loreft") -> list[vlreft.Intervention]:
    return [intervention(method, site=site, positions=POSITIONS[site]) for site in family.sites]


def both(family: Family, *items: vlreft.Intervention, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return a model with these edits on the CPU, and the same on the device in a precision."""
    model = family.build()
    shake(vlreft.attach(model, vlreft.ReftConfig(items or everywhere(family))))
    other = family.build()
    other.requires_grad_(False)
    vlreft.attach(other, vlreft.ReftConfig(items or everywhere(family)))
    other.load_state_dict(model.state_dict())
    return model, other.to(DEVICE, dtype)


def edited(family: Family, *items: vlreft.Intervention, dtype: torch.dtype = torch.float32) -> tuple[Any, vlreft.Reft]:
    """Return a model on the device, with edits attached there."""
    model = family.build().to(DEVICE, dtype)
    reft = vlreft.attach(model, vlreft.ReftConfig(items or everywhere(family)))
    return model, shake(reft)


def on_device(batch: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, device: str = DEVICE) -> dict[str, Any]:
    return {name: t.to(device, dtype) if t.is_floating_point() else t.to(device) for name, t in batch.items()}


def batch_of(family: Family, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return on_device(family.batch(family.samples), dtype)


def loss_of(output: Any) -> Tensor:
    """Return a model's own loss; open_clip has none, and gets CLIP's."""
    if not isinstance(output, tuple):
        return output.loss
    image_BE, text_BE, scale = output[:3]
    logits_BB = scale * image_BE @ text_BE.T
    return F.cross_entropy(logits_BB.float(), torch.arange(len(logits_BB), device=logits_BB.device))


def step(model: Any, batch: Mapping[str, Tensor], called: Any = None) -> list[Tensor]:
    """Return the loss and the gradients of a training step, on the CPU in float64."""
    refts = find_refts(model).values()
    model.train()
    loss = loss_of(model(**batch) if called is None else called(**batch))
    loss.backward()
    grads = [parameter.grad for reft in refts for parameter in reft.parameters()]
    model.zero_grad(set_to_none=True)
    model.eval()
    return [tensor.detach().cpu().double() for tensor in (loss, *grads)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """Assert that steps agree within a share of each tensor's length; rounding alone is no gradient."""
    largest = max(float(tensor.norm()) for tensor in theirs[1:])
    assert largest > 1e-3, "there is no gradient"
    for mine, other in zip(ours, theirs, strict=True):
        bound = tolerance * max(float(other.norm()), 1e-2 * largest)
        assert float((mine - other).norm()) <= bound, (float((mine - other).norm()), float(other.norm()))


def words(family: Family, model: Any, **more: Any) -> Tensor:
    """Generate greedily from left-padded prompts, in the model's precision."""
    samples = SAMPLES if family.has_image else TEXT_ONLY
    batch = on_device(family.batch(samples, side="left", answer=False), model.dtype)
    return model.generate(**batch, **family.generation(6, **more))


# Devices agree -------------------------------------------------------------------------------------------------------


@by_family
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-3)], ids=["float64", "float32"]
)
def test_forward_and_gradients_are_those_of_the_cpu(family, dtype, tolerance):
    reference, model = both(family, dtype=dtype)
    reference = reference.double()
    wanted = step(reference, on_device(family.batch(family.samples), torch.float64, "cpu"))
    assert_same(step(model, batch_of(family, dtype)), wanted, tolerance)


@by_family
def test_a_bfloat16_base_keeps_float32_edits(family):
    reference, model = both(family, dtype=torch.bfloat16)
    wanted = step(reference, on_device(family.batch(family.samples), device="cpu"))
    found = step(model, batch_of(family, torch.bfloat16))
    own = set(model.vlreft.parameters())
    assert {parameter.dtype for parameter in own} == {torch.float32}
    assert {p.dtype for p in model.parameters() if p not in own and p.is_floating_point()} == {torch.bfloat16}
    torch.testing.assert_close(found[0], wanted[0], rtol=0.1, atol=0.1)
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        assert mine.isfinite().all()
        if other.abs().max() > 1e-3 and other.numel() > 3:
            assert F.cosine_similarity(mine.flatten(), other.flatten(), dim=0) > 0.8


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_every_method_learns_as_on_the_cpu(method):
    family = FAMILIES["llava"]
    reference, model = both(family, *everywhere(family, method), dtype=torch.float64)
    wanted = step(reference.double(), on_device(family.batch(SAMPLES), torch.float64, "cpu"))
    assert_same(step(model, batch_of(family, torch.float64)), wanted, 1e-5)


@by_family
def test_edits_lie_where_their_blocks_do_and_go_bit_for_bit(family):
    # Frozen, as `attach` leaves it: torch multiplies weights that want gradients in another order.
    model, batch = family.build().to(DEVICE).requires_grad_(False), batch_of(family)
    with torch.no_grad():
        base = loss_of(model(**batch))
        reft = shake(vlreft.attach(model, vlreft.ReftConfig(everywhere(family))))
        assert {parameter.device.type for parameter in reft.parameters()} == {torch.device(DEVICE).type}
        assert not loss_of(model(**batch)).equal(base)
        with reft.disabled():
            assert loss_of(model(**batch)).equal(base)
        with reft.scaled(0.0):
            assert loss_of(model(**batch)).equal(base)
        reft.detach()
        assert loss_of(model(**batch)).equal(base)


@pytest.mark.parametrize("positions", ["patches:box", "patches:box[3,0,15,9]", "patches:rows[0:1]cols[:]", "cls"])
@pytest.mark.parametrize("dtype", [torch.float64])
def test_regions_are_those_of_the_cpu(positions, dtype):
    family = FAMILIES["llava"]
    item = intervention("loreft", site="vision", positions=positions)
    reference, model = both(family, item, dtype=dtype)
    reference.double()
    losses = []
    for one, device in ((reference, "cpu"), (model, DEVICE)):
        with one.vlreft.refts["default"].boxes([(0, 0, 13, 28)]), torch.no_grad():
            losses.append(one(**on_device(family.batch(SAMPLES), dtype, device)).loss.cpu())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_sources_states_and_records_are_those_of_the_cpu():
    family = FAMILIES["llava"]
    item = intervention("loreft", positions="question:l2")
    reference, model = both(family, item, dtype=torch.float64)
    found = []
    for one, device in ((reference.double(), "cpu"), (model, DEVICE)):
        batch, reft = on_device(family.batch(SAMPLES), torch.float64, device), one.vlreft.refts["default"]
        [read] = [read for read in reft.read(batch) if read.layer == 1][:1]
        with reft.recording() as edits, reft.scaled([1.0, 0.0, 0.5]), torch.no_grad():
            loss = one(**batch).loss
        swap = vlreft.Intervention("interchange", layers=0, positions="question:l2", init="reference")
        change = vlreft.attach(one, vlreft.ReftConfig(swap), "swap")
        other = {**batch, "input_ids": batch["input_ids"].flip(0), "attention_mask": batch["attention_mask"].flip(0)}
        with change.sources(other | {"labels": batch["labels"].flip(0)}), torch.no_grad():
            swapped = one(**batch).loss
        found.append([x.cpu().double() for x in (read.states_BKD, edits[0].norm_BT, loss, swapped)])
    for mine, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["to the device", "to the CPU"])
def test_adapters_are_saved_on_one_device_and_loaded_on_another(way, tmp_path):
    models = both(FAMILIES["llava"])
    first, second = models if way == "to the device" else models[::-1]
    saved = first.vlreft.refts["default"]
    saved.save_pretrained(tmp_path)
    second.vlreft.refts["default"].detach()
    loaded = vlreft.load(second, tmp_path)
    for ours, theirs in zip(loaded.parameters(), saved.parameters(), strict=True):
        assert ours.device == next(second.parameters()).device
        assert ours.cpu().equal(theirs.cpu())


# What runs once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [None, "1GB"], ids=["not kept", "kept"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])
def test_reused_prefixes_give_the_plain_gradients(name, dtype, tolerance, kept):
    family = FAMILIES[name]
    model, reft = edited(family, intervention("loreft", **TEXT), dtype=dtype)
    batch = on_device(family.batch(ABOUT_ONE_PICTURE if family.has_image else TEXT_ONLY), dtype)
    model.train()
    plain = gradients(reft, model(**batch).loss)
    reuse = PrefixReuse(reft, required=True, kept=None if kept is None else KeptPrefixes(kept))
    for _ in range(2):
        with reuse.cut(batch) as rest:
            ours = gradients(reft, model(**rest).loss)
        assert rest["input_ids"].shape[1] < batch["input_ids"].shape[1]
        assert_same([plain[0] * 0, *ours], [plain[0] * 0, *plain], tolerance)


def test_cached_features_change_nothing():
    family = FAMILIES["llava"]
    model, _ = edited(family, intervention("loreft", **TEXT), intervention("red", site="connector", positions="image"))
    batch, cache = batch_of(family), FeatureCache()
    plain = step(model, batch)
    with cache.on(model):
        assert_same(step(model, batch), plain, 1e-5)
        assert_same(step(model, batch), plain, 1e-5)
        assert (cache.num_hits, cache.num_misses) == (3, 3)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_shared_prefixes_answer_as_separate_calls_do(name):
    family = FAMILIES[name]
    model, _ = edited(family, intervention("loreft", positions="question:f4+l4", layers="all"))
    model.double()
    rows = [on_device(family.batch([sample], answer=False), torch.float64) for sample in ABOUT_IMAGES]
    alone = [model.generate(**row, **family.generation(4))[0, -4:].tolist() for row in rows]
    shared = SharedPrefixes(model)
    assert shared.generate(rows, **family.generation(4))[:, -4:].tolist() == alone
    assert shared.num_run < len(rows)


def test_questions_about_a_picture_are_answered_as_alone():
    processor = tiny_llava_processor()
    model = tiny_llava_model(processor).to(DEVICE)
    shake(vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", **TEXT))))
    model.double()
    collator, picture = vlreft.Collator(processor), Image.new("RGB", (28, 28), "red")
    asked = ["what is it", "is the square left of the circle"]
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = []
    for question in asked:
        prompt = on_device(collator.prompts([{"image": picture, "question": question}]), torch.float64)
        alone += collator.decode(model.generate(**prompt, **options), prompt["input_ids"].shape[1])
    assert vlreft.Questions(model, collator).ask(picture, asked, **options) == alone


# Generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("positions", ["f1+l2", "response"])
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])
def test_generation_does_not_depend_on_the_cache(name, positions, more):
    model, _ = edited(FAMILIES[name], intervention("loreft", positions=positions, layers="all"))
    model.double()
    assert words(FAMILIES[name], model).equal(words(FAMILIES[name], model, **more))


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=needs_cuda)]
)  # on the CPU inductor's decoding takes minutes
def test_compiled_decoding_agrees(backend):
    family = FAMILIES["llama"]
    model, _ = edited(family, intervention("loreft", positions="f1+l2", layers="all"))
    wanted = words(family, model)
    how = CompileConfig(backend=backend, mode=None, fullgraph=True)
    how._compile_all_devices = True
    assert words(family, model, cache_implementation="static", compile_config=how).equal(wanted)


def test_each_row_has_an_adapter_of_its_own():
    family = FAMILIES["llava"]
    model, _ = edited(family, intervention("loreft", positions="question:f1+l2"))
    other = vlreft.attach(model, vlreft.ReftConfig(intervention("red", positions="response")), "other")
    shake(other, seed=5)
    model.double()
    names = ["default", None, ("default", "other")]
    batch = on_device(family.batch(SAMPLES, side="left", answer=False), torch.float64)
    options = family.generation(4)
    with vlreft.use(model, rows=names):
        together = model.generate(**batch, **options)[:, -4:]
        with torch.no_grad():
            logits_BLV = model(**batch).logits
    for row, (sample, entry) in enumerate(zip(SAMPLES, names, strict=True)):
        prompt = on_device(family.batch([sample], answer=False), torch.float64)
        with vlreft.use(model, rows=[entry]), torch.no_grad():
            assert together[row].equal(model.generate(**prompt, **options)[0, -4:])
            torch.testing.assert_close(logits_BLV[row, -1], model(**prompt).logits[0, -1], rtol=1e-5, atol=1e-5)


# Compiled ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=needs_cuda)])  # minutes on a CPU
@pytest.mark.parametrize("name", ["llama", "llava", "clip"])
def test_compiled_steps_are_the_same(name, backend, monkeypatch):
    monkeypatch.setenv(*WITHOUT_CHECKS)
    family = MORE[name]
    model, _ = edited(family)
    batch = batch_of(family)
    if "return_loss" in batch:
        batch["return_loss"] = True  # the base branches on it
    plain = step(model, batch)
    called = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(step(model, batch, called), plain, 1e-3)


@needs_cuda
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_a_recorded_cuda_graph_gives_the_same(name, monkeypatch):
    monkeypatch.setenv(*WITHOUT_CHECKS)
    family = FAMILIES[name]
    model, reft = edited(family)
    called, batch = torch.compile(model, mode="reduce-overhead", fullgraph=True), batch_of(family)
    with torch.no_grad():
        wanted = model(**batch).logits
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found = called(**batch).logits.clone()
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        shake(reft, seed=5)  # new numbers need no new graph
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(called(**batch).logits.clone(), model(**batch).logits, rtol=1e-3, atol=1e-3)


# Waiting for the device ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Collect what waits for the device inside."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing CUDA" in str(one.message)]


@needs_cuda
@by_family
def test_edits_add_no_wait_for_the_device(family):
    """Whatever the base waits for, a forward with edits waits no more, from the second batch on."""
    model, reft = edited(family)
    batch = batch_of(family)
    step(model, batch)  # the first batch is looked at
    model.train()
    found = []
    for scope in (reft.disabled(), contextlib.nullcontext()):
        with scope, counted_waits() as waits:
            model(**batch)
        found.append(waits)
    assert len(found[1]) <= len(found[0]), set(found[1]) - set(found[0])


@needs_cuda
def test_an_edited_forward_never_waits_for_the_device():
    model, _ = edited(FAMILIES["llama"])
    ids_BL = torch.randint(3, 30, (2, 12), device=DEVICE)
    batch = {"input_ids": ids_BL, "labels": ids_BL.masked_fill(torch.arange(12, device=DEVICE) < 8, -100)}
    step(model, batch)
    model.train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Training ------------------------------------------------------------------------------------------------------------


def train(device: str, folder: Any, options: Mapping[str, Any], **more: Any) -> list[Tensor]:
    """Train a tiny LLaVA for three steps of two rows; return the loss and the numbers."""
    processor = tiny_llava_processor(image_size=84)
    model = tiny_llava_model(processor)
    torch.manual_seed(0)
    reft = shake(vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", positions="question:l3"))))
    rows = [
        {"image": Image.new("RGB", (84, 84), (30 * i, 0, 9)), "question": "what is it", "answer": "ab" * (i % 3 + 1)}
        for i in range(6)
    ]
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=device == "cpu", report_to="none",
        save_strategy="no", disable_tqdm=True, **LEARNING, **more,
    )  # fmt: skip
    trainer = vlreft.ReftTrainer(model, arguments, vlreft.Collator(processor), rows, **options)
    loss = trainer.train().training_loss
    assert {parameter.device.type for parameter in reft.parameters()} == {torch.device(device).type}
    return [torch.tensor(loss).double(), *(parameter.detach().cpu().double() for parameter in reft.parameters())]


@pytest.mark.parametrize(
    "options", [{"reuse_prefix": False}, {"reuse_prefix": True}, {"keep_prefixes": "1GB"}], ids=str
)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_three_steps_of_the_trainer_end_where_the_cpus_do(options, bf16, tmp_path):
    ours = train(DEVICE, tmp_path, options, bf16=bf16)
    theirs = train("cpu", tmp_path, {"reuse_prefix": False})
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=0.05 if bf16 else 1e-4, atol=0.05 if bf16 else 1e-4)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_checkpointed_blocks_give_the_same_gradients():
    family = FAMILIES["llava"]
    model, _ = edited(family)
    batch = batch_of(family)
    plain = step(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(step(model, batch), plain, 1e-4)


def test_a_head_trained_whole_is_where_its_module_is():
    family = FAMILIES["llava"]
    config = vlreft.ReftConfig([intervention("loreft", **TEXT)], modules_to_save=["multi_modal_projector"])
    models = [family.build().double(), family.build().to(DEVICE, torch.float64)]
    torch.manual_seed(0)
    shake(vlreft.attach(models[0], config))
    vlreft.attach(models[1], config)
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    wanted = step(models[0], on_device(family.batch(WITH_IMAGES), torch.float64, "cpu"))
    assert_same(step(models[1], on_device(family.batch(WITH_IMAGES), torch.float64)), wanted, 1e-5)
