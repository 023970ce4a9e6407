"""Components, paths, regions and pooled tokens against plain arithmetic: what an edit there must amount to."""

import copy

import families_dual
import families_open_clip
import pytest
import torch
from family import SAMPLES, Family
from test_families import TAIL, heard
from torch import Tensor
from zoo import FAMILIES, Spy, shake

import vlreft
from vlreft.models.sites import find_sites

BY_NAME = {family.name: family for family in TAIL} | FAMILIES
# Blocks of the plain form h + attention(norm(h)), then h + mlp(norm(h)).
PRE_NORM = ("llama", "qwen2", "gpt2", "llava", "qwen3", "phi3", "opt", "mixtral")


def vector(site: str, component: str, layer: int, positions: str, **fields: object) -> vlreft.Intervention:
    return vlreft.Intervention(
        "vector", site=site, component=component, layers=layer, positions=positions, tied=True, **fields
    )  # pyright: ignore[reportArgumentType]


def outputs_with(
    model: torch.nn.Module, batch: dict[str, Tensor], *items: vlreft.Intervention, numbers: Tensor
) -> Tensor:
    """Return what the model says when these interventions hold these numbers, in order."""
    reft = vlreft.attach(model, vlreft.ReftConfig(items))
    try:
        with torch.no_grad():
            flat = numbers.to(torch.float32)
            for parameter in reft.parameters():
                parameter.copy_(flat[: parameter.numel()].reshape(parameter.shape))
                flat = flat[parameter.numel() :]
            return heard(model(**batch))
    finally:
        reft.detach()


def double(family: Family) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model = copy.deepcopy(family.build()).double()
    batch = family.batch(family.samples)
    return model, {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def random(num: int) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(5))


SAME = [("mlp", 1, name) for name in PRE_NORM]
SAME += [("input", 0, name) for name in (*PRE_NORM, "gemma2", "bert-classes", "falcon")]


@pytest.mark.parametrize(("component", "layer", "name"), SAME)
def test_what_an_edit_in_block_1_amounts_to(component, layer, name):
    """What the MLP gives is added to the block's own output; the block's input is the output of the one before."""
    model, batch = double(BY_NAME[name])
    width = find_sites(model)["text"].width
    ours = outputs_with(model, batch, vector("text", component, 1, "f2+l1"), numbers=random(width))
    theirs = outputs_with(model, batch, vector("text", "output", layer, "f2+l1"), numbers=random(width))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    unedited = outputs_with(model, batch, vector("text", component, 1, "f2+l1"), numbers=0 * random(width))
    assert (ours - unedited).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "site"),
    [(name, "text") for name in (*PRE_NORM, "gemma2", "bert-classes", "gpt_neox", "falcon", "t5", "bloom", "gpt_oss")]
    + [("llava", "vision"), ("qwen2_5_vl", "vision"), ("internvl", "vision"), ("siglip", "vision"), ("siglip", "text")],
)
def test_edits_of_all_heads_are_one_edit_of_the_attention(name, site):
    """The heads' vectors, mixed by the output projection, are what the attention's output gets."""
    family = BY_NAME[name]
    model, batch = double(family)
    target = find_sites(model)[site].target(1, "heads")
    positions = "patches" if site == "vision" else "response" if family.text_encoder else "f2+l1"
    heads_N = random(target.width).double()
    weight = target.module.weight.detach()
    mixed_D = weight @ heads_N if isinstance(target.module, torch.nn.Linear) else heads_N @ weight
    ours = outputs_with(model, batch, vector(site, "heads", 1, positions, heads="all"), numbers=heads_N)
    theirs = outputs_with(model, batch, vector(site, "attention", 1, positions), numbers=mixed_D)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert target.num_heads > 1
    assert target.head_width * target.num_heads == target.width


def test_one_head_is_one_slice():
    family = FAMILIES["llama"]
    model, batch = double(family)
    target = find_sites(model)["text"].target(1, "heads")
    reft = shake(vlreft.attach(model, vlreft.ReftConfig(vector("text", "heads", 1, "f2", heads=[2]))))
    with torch.no_grad(), Spy(target.module, of_input=True) as spy:
        model(**batch)
    reft.detach()
    change = (spy.kept_after[0] - spy.kept[0])[:, :2].abs().amax((0, 1)) > 0
    assert change.nonzero().flatten().tolist() == list(range(2 * 8, 3 * 8))


# Paths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "gpt2", "open-clip", "t5"])
def test_a_stack_by_its_path_is_the_site_of_its_name(name):
    family = BY_NAME[name]
    model, batch = double(family)
    site = find_sites(model)["text"]
    positions = "response" if family.text_encoder else "f2+l1"
    ours = outputs_with(model, batch, vector(site.path, "output", 1, positions), numbers=random(site.width))
    theirs = outputs_with(model, batch, vector("text", "output", 1, positions), numbers=random(site.width))
    assert ours.equal(theirs)


def test_a_module_inside_a_block_by_its_path():
    model, batch = double(FAMILIES["llama"])
    path = "model.layers.1.mlp.up_proj"
    reft = shake(
        vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", site=path, positions="l2", rank=2)))
    )
    assert reft.num_parameters() == 2 * 2 * 48 + 2
    with torch.no_grad(), Spy(model.get_submodule(path)) as spy:
        model(**batch)
    assert [int(row.sum()) for row in spy.edited()] == [2] * len(SAMPLES)
    reft.detach()


@pytest.mark.parametrize("component", ["path", "attention", "mlp", "heads"])
def test_edits_inside_blocks_are_the_same_when_the_block_runs_again(component):
    """Two forwards before the backward: what is recomputed last is not what was laid out last."""
    family = FAMILIES["llama"]
    model = family.build()
    site, component = ("model.layers.1.mlp.up_proj", "output") if component == "path" else ("text", component)
    layers = "all" if component == "output" else 1
    heads = "all" if component == "heads" else None
    item = vlreft.Intervention(
        "loreft", site=site, component=component, heads=heads, layers=layers, positions="question:f1+l2", rank=2
    )
    reft = shake(vlreft.attach(model, vlreft.ReftConfig(item)))
    batches = [family.batch(SAMPLES[:2]), family.batch(SAMPLES[2:])]
    found = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        sum(model(**batch).loss for batch in batches).backward()
        found.append([parameter.grad for parameter in reft.parameters()])
        for parameter in reft.parameters():
            parameter.grad = None
    for plain, again in zip(*found, strict=True):
        assert plain.abs().max() > 1e-4
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-6)
    reft.detach()
    assert not any(
        "_gradient_checkpointing_func" in vars(b) and "vlreft" in str(b._gradient_checkpointing_func)
        for b in model.model.layers
    )


def test_reentrant_checkpoints_that_lose_the_gradient_are_refused():
    family = FAMILIES["llama"]
    model = family.build()
    item = vlreft.Intervention("loreft", component="mlp", layers=0, positions="l1", rank=2)
    reft = vlreft.attach(model, vlreft.ReftConfig(item))
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    with pytest.raises(ValueError, match=r"gives edits inside a block no gradient .* \{\"use_reentrant\": False\}"):
        model.train()(**family.batch(SAMPLES))
    reft.detach()


def test_a_connector_by_its_path_is_edited_whole():
    model, batch = double(FAMILIES["llava"])
    path = "model.multi_modal_projector"
    reft = shake(
        vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", site=path, positions="all", rank=2)))
    )
    with torch.no_grad(), Spy(model.get_submodule(path)) as spy:
        model(**batch)
    assert spy.edited().all()
    reft.detach()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"site": "model.layers.9"}, "has no site 'model.layers.9'; it has 'text', and every module by its path"),
        ({"site": "model.layers.1", "component": "mlp"}, "is one module, of which the output is edited"),
        ({"site": "model.layers.1.mlp.act_fn"}, "the width of what module '.*act_fn' gives cannot be read"),
        ({"site": "text", "component": "heads", "heads": [4]}, "head 4 is out of range: .* has 4 heads, 0 to 3"),
        ({"site": "text", "component": "heads", "heads": "all", "rank": 9}, r"`rank` \(=9\) must be at most .*\(=8\)"),
    ],
)
def test_misfits_are_named(fields, why):
    model = FAMILIES["llama"].build()
    fields = {"rank": 2, "positions": "l1", **fields}
    with pytest.raises(ValueError, match=why):
        vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", **fields)))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"component": "head"}, "`component` .*must be one of 'output', 'input', 'attention', 'mlp', 'heads'"),
        ({"component": "heads"}, "component 'heads' needs `heads`"),
        ({"heads": [1]}, "component 'output' takes no `heads`"),
        ({"component": "heads", "heads": [1, 1]}, "names a head twice"),
        ({"positions": "patches:box[4,4,4,9]"}, "has no area"),
        ({"positions": "patches:rows[3:2]cols[:]"}, "selects nothing"),
        ({"positions": "text:box"}, "'text' is no picture"),
    ],
)
def test_fields_are_checked(fields, why):
    with pytest.raises(ValueError, match=why):
        vlreft.Intervention("loreft", rank=2, **fields)


# Regions -------------------------------------------------------------------------------------------------------------


def region(site: str, positions: str) -> vlreft.ReftConfig:
    return vlreft.ReftConfig(vlreft.Intervention("vector", site=site, layers=0, positions=positions))


def edited_with(model: torch.nn.Module, family: Family, site: str, positions: str, boxes: object = None) -> Tensor:
    reft = shake(vlreft.attach(model, region(site, positions)))
    block = family.blocks(model, site)[0]
    try:
        with torch.no_grad(), Spy(block, of_input=site == "connector") as spy:
            if boxes is None:
                model(**family.batch(SAMPLES))
            else:
                with reft.boxes(boxes):  # pyright: ignore[reportArgumentType]
                    model(**family.batch(SAMPLES))
        return spy.edited()
    finally:
        reft.detach()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "demo-llava"])
@pytest.mark.parametrize("site", ["connector", "text"])
def test_a_region_of_image_tokens_is_that_of_the_patches_behind_them(name, site):
    """LLaVA's tokens are its patches, Qwen's are merge windows of 2 x 2 patches."""
    family = FAMILIES[name]
    model = family.build()
    assert family.grid is not None
    merge = 2 if name == "qwen2_5_vl" else 1
    cols = family.grid[1] // merge
    edited = edited_with(model, family, site, "image:rows[:1]cols[1:]")
    whole = edited_with(model, family, site, "image")
    for row, sample in enumerate(SAMPLES):
        tokens = [token.index for token in family.tokens(sample) if token.is_image]
        per_picture = (family.grid[0] // merge) * cols
        want = [index for place, index in enumerate(tokens) if 1 <= place % per_picture < cols]
        assert edited[row].nonzero().flatten().tolist() == want
        assert whole[row].nonzero().flatten().tolist() == tokens


@pytest.mark.parametrize("site", ["vision", "connector"])
def test_boxes_are_given_per_call_and_per_picture(site):
    family, segment = FAMILIES["llava"], {"vision": "patches", "connector": "image"}[site]
    model = family.build()
    boxes = [(0, 0, 14, 14), (0, 0, 28, 28), (20, 20, 21, 21)]
    edited = edited_with(model, family, site, f"{segment}:box", boxes)
    counts = edited.sum(1).tolist()
    assert counts == ([1, 4, 1] if site == "vision" else [1, 0, 5])
    assert edited_with(model, family, site, f"{segment}:box", boxes[:1]).sum() == 3
    same = edited_with(model, family, site, f"{segment}:box[0,0,14,14]")
    assert same.equal(edited_with(model, family, site, f"{segment}:box", boxes[:1]))


@pytest.mark.parametrize("site", ["vision", "connector"])
@pytest.mark.parametrize(
    ("positions", "boxes", "why"),
    [
        ("box", None, "needs a box for each picture"),
        ("box", [(0, 0, 14, 14)] * 2, "2 boxes were given for 3 pictures"),
        ("box", [(0, 0, 29, 14)], "reaches out of picture 0, which is 28 x 28 pixels"),
        ("box[0,0,29,14]", None, "reaches out of picture 0, which is 28 x 28 pixels"),
        ("box", [(3, 0, 3, 14)], "must be .*left, top, right, bottom.* with some area"),
        ("box", [(-3, 0, 3, 14)], "must be .*left, top, right, bottom"),
        ("rows[7:9]cols[:]", None, "holds none of the 2 x 2 patches of picture 0"),
    ],
)
def test_boxes_that_mean_nothing(site, positions, boxes, why):
    family, segment = FAMILIES["llava"], {"vision": "patches", "connector": "image"}[site]
    model = family.build()
    with pytest.raises(ValueError, match=why):
        edited_with(model, family, site, f"{segment}:{positions}", boxes)


@pytest.mark.parametrize(
    ("name", "site", "why"),
    [
        ("muse_glimmer", "vision", "in which order its tower packs the patches of a picture is not known"),
        ("internvl", "connector", "how its image tokens lie in the picture is not known"),
        ("mllama", "vision", "has no segment 'patches'"),
        ("gemma3n", "vision", "no vision stack"),
    ],
)
def test_no_region_where_no_grid_is_kept(name, site, why):
    segment = {"vision": "patches", "connector": "image"}[site]
    with pytest.raises(ValueError, match=why):
        vlreft.attach(BY_NAME[name].build(), region(site, f"{segment}:rows[:1]cols[:]"))


# The pooled token ----------------------------------------------------------------------------------------------------


def text_embedding(output: object) -> Tensor:
    """Return what a dual encoder makes of the texts; BLIP says no more than how they fit the pictures."""
    if isinstance(output, dict):
        return next(output[name] for name in ("text_features", "text_embeds", "itm_score") if name in output)
    assert isinstance(output, tuple)
    return output[1]


DUAL = [row for row in (*families_dual.ROWS, *families_open_clip.ROWS) if row.text]


@pytest.mark.parametrize("family", DUAL, ids=str)
def test_eos_is_the_token_that_the_text_embedding_is_read_from(family):
    """After the last block, an edit there is all that is heard of an edit of every token."""
    model, batch = double(family)
    site = find_sites(model)["text"]
    last, numbers_D = len(site.blocks) - 1, random(site.width).double()
    reft = vlreft.attach(model, vlreft.ReftConfig(vector("text", "output", last, "eos")))
    with torch.no_grad():
        base = text_embedding(model(**batch))
        next(reft.parameters()).copy_(numbers_D)
        pooled = text_embedding(model(**batch))
        reft.detach()
        handle = site.blocks[last].register_forward_hook(lambda _module, _args, output: plus(output, numbers_D.float()))
        everywhere = text_embedding(model(**batch))
        handle.remove()
    assert (pooled - base).abs().max() > 1e-3
    torch.testing.assert_close(pooled, everywhere, rtol=1e-6, atol=1e-6)


def plus(output: object, numbers_D: Tensor) -> object:
    return output + numbers_D if isinstance(output, Tensor) else (output[0] + numbers_D, *output[1:])  # pyright: ignore
