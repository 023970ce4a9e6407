"""Laws of interventions beside what others put on a model: peft's adapters, offloading, quantised and short weights."""

import copy
import dataclasses
import shutil

import accelerate
import pytest
import torch
from test_trainer import KINDS, arguments, base_numbers, numbers, same
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

import vlreft

peft = pytest.importorskip("peft")
# peft asks transformers for this.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def lora(*targets, **options):
    return peft.LoraConfig(r=2, target_modules=list(targets or ("q_proj", "v_proj")), **options)


def with_lora(model, seed=4, **options):
    torch.manual_seed(seed)
    return peft.get_peft_model(model, lora(**options))


def lora_numbers(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def trainer_for(kind, model, folder, trainer=vlreft.ReftTrainer, **options):
    args = arguments(folder, **options)
    return trainer(model=model, args=args, train_dataset=kind.rows(), data_collator=kind.collator())


def attached_beside_lora(kind, order, **options):
    """Return a model with both, the same numbers whatever the order."""
    model = kind.model()
    if order == "lora first":
        wrapped = with_lora(model, **options)
    torch.manual_seed(1)
    reft = vlreft.attach(model, vlreft.ReftConfig(kind.edits(init="reference")))
    if order == "reft first":
        wrapped = with_lora(model, **options)
        reft.requires_grad_()
    return wrapped, reft


# --- peft ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["lora first", "reft first"])
def test_both_train_together_and_the_base_stays(kind, order, tmp_path):
    model, reft = attached_beside_lora(kind, order)
    base = {name: value for name, value in base_numbers(reft.model).items() if "lora_" not in name}
    start = numbers(reft), lora_numbers(model)
    trainer_for(kind, model, tmp_path).train()
    assert not [name for name, value in numbers(reft).items() if torch.equal(value, start[0][name])]
    moved = [name for name, value in lora_numbers(model).items() if not torch.equal(value, start[1][name])]
    assert [name for name in start[1] if "layers.0" in name and "tower" not in name and name not in moved] == []
    assert same({name: value for name, value in base_numbers(reft.model).items() if name in base}, base)


def test_the_order_of_attaching_changes_nothing(kind, tmp_path):
    ends = []
    for order in ("lora first", "reft first"):
        model, reft = attached_beside_lora(kind, order)
        trainer_for(kind, model, tmp_path, num_train_epochs=1).train()
        ends.append((numbers(reft), list(lora_numbers(model).values())))
    assert same(*ends)


def test_lora_alone_has_the_gradients_of_a_step_that_reuses_nothing(kind, tmp_path):
    """The tokens before the first edit run without a graph elsewhere; here LoRA learns from them."""
    model, _ = attached_beside_lora(kind, "lora first", init_lora_weights=False)
    batch = kind.collator()(kind.rows(4))
    model(**batch).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer = trainer_for(kind, model, tmp_path)
    model.train()
    trainer.compute_loss(model, dict(batch)).backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(ours[name], grad)
    trainer.reuse_prefix = True
    with pytest.raises(ValueError, match="peft"):
        trainer.compute_loss(model, dict(batch))


def test_checkpoints_hold_both_and_resume_both(kind, tmp_path):
    model, reft = attached_beside_lora(kind, "lora first", lora_dropout=0.3)
    trainer_for(kind, model, tmp_path / "whole", save_strategy="steps", save_steps=2).train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    other, other_reft = attached_beside_lora(kind, "reft first", seed=77, lora_dropout=0.3)
    trainer_for(kind, other, tmp_path / "resumed").train(resume_from_checkpoint=True)
    assert same(numbers(other_reft), numbers(reft))
    assert same(list(lora_numbers(other).values()), list(lora_numbers(model).values()))


@pytest.mark.parametrize("order", ["lora first", "reft first"])
def test_saved_apart_and_loaded_to_the_same_outputs(kind, order, tmp_path):
    model, reft = attached_beside_lora(kind, "lora first", init_lora_weights=False)
    batch = kind.collator().prompts(kind.rows(3))
    generation = {"max_new_tokens": 5, "do_sample": False}
    model.eval()
    with torch.no_grad():
        logits, ids = model(**batch).logits, model.generate(**batch, **generation)
    reft.save_pretrained(tmp_path / "reft")
    model.save_pretrained(str(tmp_path / "lora"))

    fresh = kind.model()
    if order == "reft first":
        vlreft.load(fresh, tmp_path / "reft")
    again = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "lora"))
    if order == "lora first":
        vlreft.load(fresh, tmp_path / "reft")
    again.eval()
    with torch.no_grad():
        assert again(**batch).logits.equal(logits)
    assert again.generate(**batch, **generation).equal(ids)


def test_one_after_the_other(kind, tmp_path):
    model, reft = kind.attached()
    trainer_for(kind, model, tmp_path, num_train_epochs=1).train()
    ours = numbers(reft)
    reft.requires_grad_(False)
    wrapped = with_lora(model)
    start = lora_numbers(wrapped)
    trainer_for(kind, wrapped, tmp_path, Trainer, num_train_epochs=1, remove_unused_columns=False).train()
    assert same(numbers(reft), ours)
    assert not same(lora_numbers(wrapped), start)


def test_interventions_that_peft_froze_are_not_silently_left_out(kind, tmp_path):
    model, reft = kind.attached()
    wrapped = with_lora(model).train()
    batch = kind.collator()(kind.rows(2))
    with pytest.raises(ValueError, match=r"are frozen, but others train.*`reft\.requires_grad_\(\)`"):
        wrapped(**batch)
    with pytest.raises(ValueError, match=r"'default' are frozen.*`reft\.requires_grad_\(\)`"):
        trainer_for(kind, wrapped, tmp_path).train()
    with torch.no_grad():
        wrapped(**batch)
    wrapped.eval()(**batch)
    reft.requires_grad_(False)
    wrapped.train()(**batch).loss.backward()
    assert {p.grad for p in reft.parameters()} == {None}


def test_adapters_that_no_checkpoint_could_hold_are_refused(kind, tmp_path):
    model = kind.model()
    peft.inject_adapter_in_model(lora(), model)
    vlreft.attach(model, vlreft.ReftConfig(kind.edits()))
    with pytest.raises(ValueError, match=r"only a `PeftModel` can save them.*get_peft_model"):
        trainer_for(kind, model, tmp_path).train()


@pytest.mark.parametrize("component", ["attention", "mlp", "heads"])
def test_an_edit_beside_a_layer_of_pefts_edits_what_peft_adds_too(component):
    """The edit of a projection's output sees LoRA's part of it, that of heads' states reaches LoRA's input."""
    kind = KINDS["text"]
    options = {"component": component} | ({"heads": "all"} if component == "heads" else {})
    config = vlreft.ReftConfig(vlreft.Intervention("vector", layers=[0], positions="prompt", **options))
    model = kind.model()
    wrapped = peft.get_peft_model(model, lora("o_proj", "down_proj", init_lora_weights=False)).eval()
    batch = kind.collator().prompts(kind.rows(2))
    block = model.model.layers[0]
    layer = block.mlp.down_proj if component == "mlp" else block.self_attn.o_proj
    states = []

    def look(_module, args, output):
        states.append((args[0], output))

    handle = layer.register_forward_hook(look)
    with torch.no_grad():
        wrapped(**batch)
        reft = vlreft.attach(model, config)
        for parameter in reft.parameters():
            parameter.data.normal_()
        handle.remove()
        layer.register_forward_hook(look)
        wrapped(**batch)
    (before_in, before_out), (after_in, after_out) = states[:2]
    whole = torch.cat([parameter.detach() for parameter in reft.parameters()])
    reft.detach()
    seen = batch["attention_mask"].bool()
    if component == "heads":
        moved = (after_in - before_in)[seen]
        assert after_out.equal(layer(after_in))
    else:
        moved = (after_out - before_out)[seen]
    torch.testing.assert_close(moved, whole.expand_as(moved))


@pytest.mark.parametrize("component", ["attention", "mlp", "heads"])
def test_an_edit_that_peft_has_wrapped_is_refused(component):
    kind = KINDS["text"]
    options = {"component": component} | ({"heads": "all"} if component == "heads" else {})
    model = kind.model()
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", layers=[0], rank=2, **options)))
    wrapped = peft.get_peft_model(model, lora("o_proj", "down_proj"))
    with pytest.raises(ValueError, match=rf"layer 0 \({component}\) is at a Linear that peft has wrapped since"):
        wrapped.eval()(**kind.collator().prompts(kind.rows(2)))
    reft.detach()
    vlreft.attach(model, reft.config)
    wrapped(**kind.collator().prompts(kind.rows(2)))


@pytest.mark.parametrize("damage", ["gone", "another rank", "broken"])
def test_a_checkpoint_without_its_lora_is_refused(damage, tmp_path):
    kind = KINDS["text"]
    model, _ = attached_beside_lora(kind, "lora first")
    trainer_for(kind, model, tmp_path, save_strategy="epoch", num_train_epochs=1).train()
    folder = tmp_path / "checkpoint-3"
    other, _ = attached_beside_lora(kind, "lora first")
    if damage == "gone":
        shutil.rmtree(folder / "peft")
    elif damage == "broken":
        (folder / "peft" / "adapter_model.safetensors").write_bytes(b"nothing")
    else:
        (folder / "peft").rename(folder / "moved")
        kind_of_other = peft.get_peft_model(kind.model(), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
        kind_of_other.save_pretrained(str(folder / "peft"))
    told = {"gone": "there is no", "broken": "not a whole safetensors file", "another rank": "made with another config"}
    with pytest.raises(ValueError, match=told[damage]):
        trainer_for(kind, other, tmp_path).train(resume_from_checkpoint=str(folder))


# --- a reference that takes no memory ------------------------------------------------------------------------------


def test_the_reference_is_the_base_and_shares_its_weights(kind):
    base, batch = kind.model(), kind.collator()(kind.rows(3))
    with torch.no_grad():
        logits = base(**batch).logits
    model, reft = kind.attached(init="reference")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    twin = vlreft.reference(model)
    theirs = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    assert {id(p) for p in twin.parameters()} | {id(b) for b in twin.buffers()} <= theirs
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(p.requires_grad for p in twin.parameters())
    with torch.no_grad():
        assert twin(**batch).logits.equal(logits)
        assert not model(**batch).logits.equal(logits)
    prompts = kind.collator().prompts(kind.rows(2))
    with reft.disabled():
        ids = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    assert twin.generate(**prompts, max_new_tokens=4, do_sample=False).equal(ids)


def test_a_reference_that_would_move_is_refused(kind):
    with pytest.raises(ValueError, match="no interventions are attached"):
        vlreft.reference(kind.model())
    model, _ = attached_beside_lora(kind, "lora first")
    with pytest.raises(ValueError, match=r"beside the interventions are trained \(.*lora_"):
        vlreft.reference(model.get_base_model())


# --- offloading ------------------------------------------------------------------------------------------------------


def offload(model, how, folder):
    on_disk = ("layers", "language_model", "vision_tower")
    if how == "cpu_offload":
        accelerate.cpu_offload(model, torch.device("cpu"))
    elif how == "disk_offload":
        accelerate.disk_offload(model, folder, torch.device("cpu"))
    elif how == "a device map of one":
        accelerate.dispatch_model(model, {"": "cpu"})
    else:
        names = [name for name, _ in model.model.named_children()]
        devices = {f"model.{name}": "disk" if name in on_disk else "cpu" for name in names} | {"lm_head": "cpu"}
        accelerate.dispatch_model(model, devices, offload_dir=folder, main_device="cpu")


def step_and_words(kind, model, reft):
    """Return the loss and gradients of a training step, and what is generated."""
    model.train()
    loss = model(**kind.collator()(kind.rows(4))).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in reft.edits.named_parameters()}
    model.eval()
    ids = model.generate(**kind.collator().prompts(kind.rows(3)), max_new_tokens=5, do_sample=False)
    return {"loss": loss.detach(), "grads": grads, "ids": ids}


OFFLOADS = ["a device map of one", "cpu_offload", "disk_offload", "a device map with a disk"]


@pytest.mark.parametrize("how", OFFLOADS)
def test_an_offloaded_base_gives_the_same_step_and_the_same_words(kind, how, tmp_path):
    wanted = step_and_words(kind, *kind.attached(init="reference"))
    model = kind.model()
    offload(model, how, tmp_path)
    torch.manual_seed(1)
    reft = vlreft.attach(model, vlreft.ReftConfig(kind.edits(init="reference")))
    assert same(step_and_words(kind, model, reft), wanted)


def test_the_trainer_takes_a_base_with_a_device_map(kind, tmp_path):
    model, reft = kind.attached()
    trainer_for(kind, model, tmp_path).train()
    offloaded = kind.model()
    offload(offloaded, "a device map with a disk", tmp_path / "weights")
    torch.manual_seed(1)
    other = vlreft.attach(offloaded, vlreft.ReftConfig(kind.edits()))
    trainer_for(kind, offloaded, tmp_path).train()
    assert same(numbers(other), numbers(reft))


def test_training_interventions_that_were_offloaded_themselves_is_refused(kind):
    model, _ = kind.attached()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="offload the base first, then attach"):
        model.train()(**kind.collator()(kind.rows(2)))


# --- short and quantised weights -----------------------------------------------------------------------------------


def learn(kind, model, reft, folder):
    """Train, save, load on the same base; the numbers are float32 and the words the same."""
    start = numbers(reft)
    trainer_for(kind, model, folder, num_train_epochs=1).train()
    assert {parameter.dtype for parameter in reft.parameters()} == {torch.float32}
    assert not [name for name, value in numbers(reft).items() if torch.equal(value, start[name])]
    model.eval()
    batch = kind.collator().prompts(kind.rows(2))
    with torch.no_grad():
        logits, ids = model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)
        reft.save_pretrained(folder / "adapter")
        reft.detach()
        assert not model(**batch).logits.equal(logits)
        vlreft.load(model, folder / "adapter")
        assert model(**batch).logits.equal(logits)
    assert model.generate(**batch, max_new_tokens=4, do_sample=False).equal(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_bases(kind, dtype, tmp_path):
    learn(kind, *kind.attached(dtype=dtype, init="reference"), tmp_path)


def wide_text_model(tokenizer):
    """Make a Llama whose layers are wide enough for four bits at a time."""
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).eval()


# These libraries are young, and warn about themselves.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"])
@pytest.mark.parametrize("name", KINDS)
def test_quantised_bases(name, how, tmp_path):
    from transformers import BitsAndBytesConfig, TorchAoConfig

    kind = KINDS[name]
    if how == "bitsandbytes nf4" and name == "text":
        kind = dataclasses.replace(kind, build=wide_text_model)
    elif how == "bitsandbytes nf4":
        pytest.skip("its kernel wants layers in multiples of 32; the tower's have 24")
    if how == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization")
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = BitsAndBytesConfig(**(four if how.endswith("nf4") else {"load_in_8bit": True}))
    base = kind.model()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base", quantization_config=config, device_map={"": "cpu"})
    model.eval()
    reft = vlreft.attach(model, vlreft.ReftConfig(kind.edits(init="reference")))
    learn(kind, model, reft, tmp_path)
    assert "_hf_peft_config_loaded" not in vars(model)


class Quantizer:
    """What transformers keeps of a quantisation, of a method without a gradient."""

    is_trainable = False
    quantization_config = type("Config", (), {"quant_method": "made_up"})()


def test_a_quantisation_without_a_gradient_is_refused(tmp_path):
    kind = KINDS["text"]
    model, _ = kind.attached()
    model.is_quantized, model.hf_quantizer = True, Quantizer()
    with pytest.raises(ValueError, match="quantised by made_up, which has no gradient"):
        trainer_for(kind, model, tmp_path)


# --- the base's own checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # transformers says which keys it did not expect
def test_a_model_saved_while_attached_loads_as_the_base(kind, tmp_path):
    """Its file holds the interventions too, so that trainers of others can resume; the base takes no notice."""
    model, reft = kind.attached(init="reference")
    batch = kind.collator()(kind.rows(3))
    with torch.no_grad(), reft.disabled():
        logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = type(kind.model()).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert again(**batch).logits.equal(logits)


def test_a_trainer_of_others_resumes(kind, tmp_path):
    ends = []
    for seed in (1, 9):
        model, reft = kind.attached(seed=seed, dropout=0.3)
        options = {"save_strategy": "steps", "save_steps": 2, "remove_unused_columns": False}
        trainer = trainer_for(kind, model, tmp_path, Trainer, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if ends else None)
        ends.append(copy.deepcopy(numbers(reft)))
    assert same(*ends)
