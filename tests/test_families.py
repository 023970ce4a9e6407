"""Every family of the long tail, held to the laws that need no more than its row.

The few families of `zoo.py` are held to all laws in every detail by the other tests. Here each of a hundred is asked
the same questions once: are its sites found, is an edit where it was asked for and nowhere else, is it heard, does it
train, does generation agree, does the base come back. What a base itself breaks stands in its row's `skips`.
"""

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import hooks_of_vlreft
from family import PAD, Family, Sample, Token
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import Spy, plain_positions, plain_tower_positions, shake

import vlreft
from vlreft.models.sites import find_sites
from vlreft.reft import find_reft

FILES = ("rows", "packed", "special", "text", "dual", "open_clip")
TAIL: tuple[Family, ...] = tuple(row for name in FILES for row in importlib.import_module(f"families_{name}").ROWS)
HEARD = (
    *("logits", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds", "itm_score", "loss"),
    *("image_features", "text_features", "last_hidden_state"),
)
POSITIONS = {
    "text": ("f2+l1", "prompt"),
    "text_encoder": ("f2+l1", "prompt"),
    "connector": ("image", "image:f1+l1"),
    "vision": ("patches", "patches:f2+l1", "patches:uniform2", "cls", "patches:rows[0:1]cols[:]"),
}
# Towers that pack pictures: the order in which a picture's patches come to the blocks is known here for these.
RASTER = {
    *("paddleocr_vl", "hunyuan_vl", "kimi_k25", "lighton_ocr", "llava_pixtral", "mistral3"),
    *("minicpm_ocr", "minicpmv4_7", "minicpmv4_6"),
}
WINDOWS = {"exaone4_5", "hyperclovax_vision_v2"}  # merge windows, sorted by attention window


def positions_at(family: Family, site: str) -> tuple[str, ...]:
    if site == "vision" and family.vision_positions:
        return family.vision_positions
    if site == "text" and has_encoder(family):
        return ("response", "prompt")  # the prompt is one token
    return POSITIONS[site]


def has_encoder(family: Family) -> bool:
    return bool(family.text_encoder) or family.name in ("pix2struct", "vision_encoder_decoder", "pp_formulanet")


CASES = [
    pytest.param(family, site, positions, id=f"{family}-{site}-{positions}")
    for family in TAIL
    for site in family.sites
    for positions in positions_at(family, site)
    if (positions != "cls" or family.num_cls) and ("rows" not in positions or family.grid is not None)
]
SITES = [pytest.param(family, site, id=f"{family}-{site}") for family in TAIL for site in family.sites]
GENERATING = [family for family in TAIL if "generate" not in family.skips]
by_family = pytest.mark.parametrize("family", TAIL, ids=str)


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Module]:
    return {}


@pytest.fixture
def model_of(built: dict[str, nn.Module]) -> Iterator[Any]:
    """Lend a family's model; it must come back without a trace of the library."""
    lent: list[nn.Module] = []

    def lend(family: Family) -> nn.Module:
        if family.name not in built:
            built.clear()  # tests come by family: one model at a time is kept
            built[family.name] = family.build()
            built[family.name].requires_grad_(False)  # torch convolves frozen weights by another kernel
        lent.append(built[family.name])
        return lent[-1]

    yield lend
    for model in lent:
        while (reft := find_reft(model)) is not None:
            reft.detach()
        model.eval()
        assert hooks_of_vlreft(model) == []
        assert "generate" not in model.__dict__


def loreft(family: Family, site: str, positions: str | None = None, **fields: Any) -> vlreft.Intervention:
    layers = fields.pop("layers", 0 if positions == "cls" or site == "connector" else 1)
    positions = positions_at(family, site)[0] if positions is None else positions
    return vlreft.Intervention("loreft", site=site, layers=layers, positions=positions, rank=2, **fields)


def attached(model: nn.Module, *items: vlreft.Intervention) -> vlreft.Reft:
    return shake(vlreft.attach(model, vlreft.ReftConfig(items)))


def heard(output: Any) -> Tensor:
    """Return all that a model says of a batch as one vector."""
    values = list(output.values()) if isinstance(output, dict) else list(output)
    if isinstance(output, dict):
        values = [value for name, value in output.items() if name in HEARD]
    return torch.cat([value.flatten().float() for value in values if isinstance(value, Tensor)])


def rows_of(edited: Tensor, family: Family, site: str) -> list[list[int]]:
    """Return the indices of edited states by row of the batch, or by picture."""
    if family.name == "open-clip-lnd":
        edited = edited.T
    edited = edited[None] if edited.dim() == 1 else edited.flatten(1)
    if site == "vision" and family.packed:
        return [row.nonzero()[:, 0].tolist() for row in edited.reshape(-1, family.vision_tokens)]
    return [row.nonzero()[:, 0].tolist() for row in edited]


def tokens_of(family: Family, site: str, sample: Sample, *, answer: bool = True) -> list[Token]:
    """Return what each token of a sample's row is to the stack at a site."""
    if not has_encoder(family):
        return family.tokens(sample, answer=answer)
    if site != "text":
        return family.tokens(sample, answer=False)
    # The decoder reads a start token, then each label but the last; BLIP's reads that too.
    num_read = len(family.answer_ids(sample)) + (family.name == "blip_vqa")
    return [Token(i, False, i > 0) for i in range(num_read if answer else 1)]


def expected(family: Family, site: str, positions: str, samples: tuple[Sample, ...]) -> list[list[int]] | None:
    """Return what must be edited by the plain reimplementation; None where the order is not known here."""
    if site != "vision":
        return [plain_positions(positions, tokens_of(family, site, sample)) for sample in samples]
    one = plain_tower_positions(positions, family)
    if family.packed and positions != "patches" and family.name not in RASTER:
        if family.name in WINDOWS or family.grid is None:
            return None
        rows_cols = [divmod(place, family.grid[1]) for place in one]
        one = sorted((r // 2 * (family.grid[1] // 2) + c // 2) * 4 + r % 2 * 2 + c % 2 for r, c in rows_cols)
    return [one]


# The sites -----------------------------------------------------------------------------------------------------------


def test_the_zoo_is_as_large_as_it_says():
    names = [family.name for family in TAIL]
    assert len(set(names)) == len(names)
    kinds = {name: len(importlib.import_module(f"families_{name}").ROWS) for name in FILES}
    assert kinds["rows"] + kinds["packed"] + kinds["special"] >= 60
    assert kinds["text"] >= 20
    assert kinds["dual"] >= 8
    assert kinds["open_clip"] >= 5


@by_family
def test_sites_are_found_by_structure(family, model_of):
    model = model_of(family)
    sites = find_sites(model)
    assert set(sites.by_name) == set(family.sites) - set(family.refused)
    for name, site in sites.by_name.items():
        blocks = list(family.blocks(model, name))
        assert list(site.blocks) == (blocks[:1] if name == "connector" else blocks)
    for name, why in family.refused.items():
        with pytest.raises(ValueError, match=why):
            attached(model, loreft(family, name))


# The edit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "site", "positions"), CASES)
def test_an_edit_is_where_it_was_asked_for_and_is_heard(family, site, positions, model_of):
    if site in family.refused:
        pytest.skip(family.refused[site])
    model, batch = model_of(family), family.batch(family.samples)
    layer = 0 if positions == "cls" or site == "connector" else 1
    with torch.no_grad():
        base = heard(model(**batch))
        reft = attached(model, loreft(family, site, positions))
        with Spy(family.blocks(model, site)[layer], of_input=site == "connector") as spy:
            output = heard(model(**batch))
            with reft.disabled():
                assert heard(model(**batch)).equal(base)
        edited = rows_of(spy.edited(0), family, site)
        want = expected(family, site, positions, family.samples)
        if want is not None:
            assert edited == (want if len(want) == len(edited) else want * len(edited))
        else:
            assert {len(row) for row in edited} == {len(plain_tower_positions(positions, family))}
        assert spy.before[0].equal(spy.kept[0])
        assert not output.equal(base)
        reft.detach()
        assert heard(model(**batch)).equal(base)


@pytest.mark.parametrize(("family", "site"), SITES)
def test_identity_start_is_the_base(family, site, model_of):
    if site in family.refused:
        pytest.skip(family.refused[site])
    model, batch = model_of(family), family.batch(family.samples)
    with torch.no_grad():
        base = heard(model(**batch))
        vlreft.attach(model, vlreft.ReftConfig(loreft(family, site, layers="all")))
        assert heard(model(**batch)).equal(base)


@pytest.mark.parametrize(("family", "site"), SITES)
def test_all_layers_are_those_that_matter(family, site, model_of):
    """Each block that "all" stands for is heard, any other is refused by name: no edit is lost without a word."""
    if site in family.refused or site == "connector":
        pytest.skip(family.refused.get(site, "one layer"))
    model, batch = model_of(family), family.batch(family.samples)
    positions = "eos" if "eos" in find_sites(model)[site].segments else "all"
    live = find_sites(model)[site].num_live
    with torch.no_grad():
        base = heard(model(**batch))
        for layer in range(len(family.blocks(model, site))):
            if layer >= live:
                with pytest.raises(ValueError, match="can never matter"):
                    attached(model, loreft(family, site, positions, layers=layer))
                continue
            reft = attached(model, loreft(family, site, positions, layers=layer))
            assert not heard(model(**batch)).equal(base), f"layer {layer}"
            reft.detach()


# Training and saving -------------------------------------------------------------------------------------------------


def sites_of(family: Family) -> list[str]:
    return [site for site in family.sites if site not in family.refused]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    if isinstance(output, dict) and "loss" in output and output["loss"] is not None:
        return output["loss"]
    values = output.values() if isinstance(output, dict) else output
    floats = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    return torch.stack([(value * value.detach().sign()).sum() for value in floats]).sum()


def gradients_of(model: nn.Module, reft: vlreft.Reft, batch: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)  # GroupViT draws noise in training
    loss_of(model, batch).backward()
    found = [parameter.grad for parameter in reft.parameters()]
    for parameter in reft.parameters():
        parameter.grad = None
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found)
    return found  # pyright: ignore[reportReturnType]


@by_family
def test_a_step_trains_the_edits_and_nothing_else(family, model_of):
    if not sites_of(family):
        pytest.skip("no site")
    model, batch = model_of(family), family.batch(family.samples)
    reft = attached(model, *(loreft(family, site, layers=0) for site in sites_of(family)))
    model.train()
    for name, gradient in zip(dict(reft.edits.named_parameters()), gradients_of(model, reft, batch), strict=True):
        assert gradient.abs().max() > 0, name
    own = {id(parameter) for parameter in reft.parameters()}
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters() if id(p) not in own)


@by_family
def test_saved_and_loaded_is_bit_for_bit(family, model_of, tmp_path):
    if not sites_of(family):
        pytest.skip("no site")
    model, batch = model_of(family), family.batch(family.samples)
    reft = attached(model, *(loreft(family, site) for site in sites_of(family)))
    with torch.no_grad():
        edited = heard(model(**batch))
        reft.save_pretrained(tmp_path)
        reft.detach()
        vlreft.load(model, tmp_path)
        assert heard(model(**batch)).equal(edited)


# Reentrant checkpoints announce that blocks in front of the first edit give no gradient; there is none to give.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@by_family
def test_checkpointing_keeps_the_gradients(family, use_reentrant, model_of):
    law = "reentrant" if use_reentrant and "reentrant" in family.skips else "checkpointing"
    if not sites_of(family) or law in family.skips:
        pytest.skip(family.skips.get(law, "no site"))
    model, batch = model_of(family), family.batch(family.samples)
    items = [loreft(family, site) for site in sites_of(family)]
    if not use_reentrant:
        items += [loreft(family, site, component="mlp") for site in sites_of(family) if has(model, site, "mlp")]
    reft = attached(model, *items)
    model.train()
    plain = gradients_of(model, reft, batch)
    switch_checkpointing(model, on=True, use_reentrant=use_reentrant)
    try:
        again = gradients_of(model, reft, batch)
    finally:
        switch_checkpointing(model, on=False)
    for mine, other in zip(again, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


def switch_checkpointing(model: nn.Module, *, on: bool, use_reentrant: bool = False) -> None:
    if isinstance(model, PreTrainedModel):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        else:
            model.activation_checkpointing_disable()
    else:
        model.set_grad_checkpointing(on)  # pyright: ignore[reportCallIssue]


# Generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GENERATING, ids=str)
def test_generation_edits_the_prompt_and_only_it(family, model_of):
    """Left-padded in a batch, and one by one: the same tokens are edited, and where the base allows it, generated."""
    site = "text_encoder" if family.text_encoder else "text"
    if site in family.refused:
        pytest.skip(family.refused[site])
    positions = "prompt" if has_encoder(family) and site == "text" else "f2+l1"
    model = model_of(family)
    attached(
        model,
        loreft(family, site, positions),
        *(loreft(family, s) for s in sites_of(family) if s not in (site, "text")),
    )
    side = "right" if family.text_encoder else "left"
    batch = family.batch(family.samples, side=side, answer=False)
    num_prompt = batch["input_ids"].shape[1] if "input_ids" in batch else 1
    with torch.no_grad(), Spy(family.blocks(model, site)[1]) as spy:
        together = model.generate(**batch, **family.generation())
        num_calls = len(spy.before)
        alone = [
            model.generate(**family.batch([sample], side=side, answer=False), **family.generation())
            for sample in family.samples
        ]
    edited = rows_of(spy.edited(0), family, site)
    for row, sample in enumerate(family.samples):
        tokens = tokens_of(family, site, sample, answer=False)
        pads = num_prompt - len(tokens) if side == "left" else 0
        tokens = tokens[:-1] if family.name == "blip" else tokens  # it generates from all but the last
        assert edited[row] == [pads + place for place in plain_positions(positions, tokens)]
    for call in range(1, num_calls):
        changed = spy.edited(call)
        is_whole = changed.shape[1] >= num_prompt  # without a cache the prompt comes again
        assert not changed[:, num_prompt if is_whole else 0 :].any()
    if "left padding" in family.skips or "batching" in family.skips or family.text_encoder:
        return
    for row, ids in enumerate(alone):
        assert (
            together[row, -family.generation()["max_new_tokens"] :].tolist()
            == ids[0, -family.generation()["max_new_tokens"] :].tolist()
        )


ENCODED = [family for family in GENERATING if has_encoder(family) and "text" not in family.refused]


@pytest.mark.parametrize("positions", ["response", "prompt", "response:f2"])
@pytest.mark.parametrize("family", ENCODED, ids=str)
def test_a_decoder_is_edited_alike_in_training_and_generation(family, positions, model_of):
    """With a cache, without one, and with the generated answer as labels: the same logits."""
    model = model_of(family)
    attached(model, loreft(family, "text", positions))
    sample = family.samples[0]
    batch = family.batch([sample], side="right", answer=False)
    some = {"suppress_tokens": [PAD, *family.image_tokens]}  # labels that are pads would be masked in training
    options = family.generation(5, return_dict_in_generate=True, output_logits=True) | some
    with torch.no_grad():
        cached, whole = (model.generate(**batch, **options, use_cache=use) for use in (True, False))
        assert cached.sequences.equal(whole.sequences)
        assert model.generate(**batch, **family.generation(5), num_beams=2, use_cache=True).equal(
            model.generate(**batch, **family.generation(5), num_beams=2, use_cache=False)
        )
        if family.name == "blip_vqa":
            return  # its forward returns no logits
        labels = cached.sequences[:, -5:]
        logits = model(**batch, labels=labels, decoder_input_ids=cached.sequences[:, :-1]).logits[:, -5:]
    torch.testing.assert_close(torch.stack(cached.logits, 1), logits, rtol=1e-4, atol=1e-4)


def test_a_cache_that_does_not_count_its_tokens_is_refused(model_of):
    family = next(family for family in TAIL if family.name == "mamba")
    model, batch = model_of(family), family.batch(family.samples, side="left", answer=False)
    attached(model, loreft(family, "text"))
    with pytest.raises(ValueError, match=r"does not say how many tokens it holds.* use_cache=False"):
        model.generate(**batch, **family.generation())
    model.generate(**batch, **family.generation(), use_cache=False)


# Components ----------------------------------------------------------------------------------------------------------


def has(model: nn.Module, site: str, component: str) -> bool:
    if site == "connector":
        return False
    try:
        find_sites(model)[site].target(1, component)
    except ValueError as error:
        if not re.search(r"has no|not found|keeps its heads|does not say", str(error)):
            raise
        return False
    return True


@pytest.mark.parametrize("component", ["input", "attention", "mlp", "heads"])
@pytest.mark.parametrize(("family", "site"), [case for case in SITES if "connector" not in case.id])
def test_components_are_edited_where_asked_or_refused(family, site, component, model_of):
    """A component is heard, and leaves all other positions of its block alone; or one sentence says why not."""
    if site in family.refused:
        pytest.skip(family.refused[site])
    model, batch = model_of(family), family.batch(family.samples)
    if not has(model, site, component):
        pytest.skip("refused")
    positions = positions_at(family, site)[0]
    item = loreft(
        family, site, positions, component=component, heads="all" if component == "heads" else None, tied=True
    )
    with torch.no_grad():
        base = heard(model(**batch))
        reft = attached(model, item)
        target = find_sites(model)[site].target(1, component)
        try:
            with Spy(target.module, of_input=target.at_input) as spy:
                output = heard(model(**batch))
        except ValueError as error:
            if "works on states of shape" not in str(error):
                raise
            pytest.skip(str(error))
        assert not output.equal(base)
        want = expected(family, site, positions, family.samples)
        if want is not None:
            changed = spy.edited(0)
            if changed.dim() == 1 and not (site == "vision" and family.packed):
                changed = changed.reshape(len(want), -1)  # its tokens come in one row
            edited = rows_of(changed, family, site)
            assert edited == (want if len(want) == len(edited) else want * len(edited))
        with reft.disabled():
            assert heard(model(**batch)).equal(base)
