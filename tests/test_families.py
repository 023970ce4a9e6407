"""Every family of the long tail, held to the laws that need no more than its row.

The few families of `zoo.py` are held to all laws in every detail by the other tests. Here each of a hundred is asked the
same questions once: are its sites found, is an edit where it was asked for and nowhere else, is it heard, does it
train, does generation agree, does the base come back. What a base itself breaks stands in its row's `skips`.
"""

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import hooks_of_vlreft
from family import Family, Sample, Token
from torch import Tensor, nn
from zoo import Spy, plain_positions, plain_tower_positions, shake

import vlreft
from vlreft.reft import find_reft
from vlreft.sites import find_sites

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
    "paddleocr_vl",
    "hunyuan_vl",
    "kimi_k25",
    "lighton_ocr",
    "llava_pixtral",
    "mistral3",
    "minicpm_ocr",
    "minicpmv4_7",
    "minicpmv4_6",
}
WINDOWS = {"exaone4_5", "hyperclovax_vision_v2"}  # merge windows, sorted by attention window


def positions_at(family: Family, site: str) -> tuple[str, ...]:
    return family.vision_positions if site == "vision" and family.vision_positions else POSITIONS[site]


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


def loreft(site: str, positions: str | None = None, **fields: Any) -> vlreft.Intervention:
    layers = fields.pop("layers", 0 if positions == "cls" or site == "connector" else 1)
    positions = POSITIONS[site][0] if positions is None else positions
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
    if not family.text_encoder and not reads_pictures_first(family):
        return family.tokens(sample, answer=answer)
    if site != "text":
        return family.tokens(sample, answer=False)
    # The decoder reads a start token, then each label but the last.
    return [Token(i, False, i > 0) for i in range(len(family.answer_ids(sample)) if answer else 1)]


def reads_pictures_first(family: Family) -> bool:
    return family.name in ("pix2struct", "vision_encoder_decoder", "pp_formulanet")


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
            attached(model, loreft(name))


# The edit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "site", "positions"), CASES)
def test_an_edit_is_where_it_was_asked_for_and_is_heard(family, site, positions, model_of):
    if site in family.refused:
        pytest.skip(family.refused[site])
    model, batch = model_of(family), family.batch(family.samples)
    layer = 0 if positions == "cls" or site == "connector" else 1
    with torch.no_grad():
        base = heard(model(**batch))
        reft = attached(model, loreft(site, positions))
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
