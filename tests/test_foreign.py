"""Adapters of pyreft and of AdapterHub, saved by these libraries, give here what they give there; see `golden/`."""

import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import half_frozen, llama, untouched
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

import vlreft
from vlreft.saving.foreign import orthogonal_weight, read_tensors

ARCHIVE = Path(__file__).parent / "golden" / "foreign.tar.gz"
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig), "bert": (BertModel, BertConfig)}

# Recorded case: positions, what else has to be said, the method it becomes and whether it is tied.
PYREFT = {
    "loreft": ("f2+l2", {}, "loreft", False),
    "loreft_tied": ("f2+l2", {}, "loreft", True),
    "loreft_relu": ("l2", {"activation": "relu"}, "loreft", False),
    "direft": ("f2+l2", {}, "direft", False),
    "noreft": ("f2+l2", {}, "noreft", False),
    "noreft_nobias": ("l1", {}, "noreft", False),
    "nodireft": ("l1", {}, "nodireft", False),
    "consreft": ("f1", {}, "consreft", False),
    "lobireft": ("f1", {}, "lobireft", False),
    "path": ("f2+l2", {}, "loreft", False),
    "trainer": ("l1", {}, "loreft", False),
}
# Recorded case: what has to be said, and the intervention that it becomes.
ADAPTERHUB = {
    "loreft": ({}, {"method": "loreft", "positions": "l2+[:2]", "rank": 2, "tied": False, "dropout": 0.05}),
    "loreft_tied": ({}, {"method": "loreft", "positions": "l1+[:3]", "tied": True}),
    "loreft_prefix": ({}, {"method": "loreft", "positions": "[:2]", "activation": "relu"}),
    "loreft_suffix": ({}, {"method": "loreft", "positions": "l3", "layers": (0, 1)}),
    "loreft_layer": ({}, {"method": "loreft", "positions": "[:3]", "layers": (1,), "rank": 1}),
    "noreft": ({"method": "noreft"}, {"method": "noreft", "positions": "l2+[:3]"}),
    "direft": ({"method": "nodireft"}, {"method": "nodireft", "positions": "l2+[:3]"}),
    "bert": ({}, {"method": "loreft", "positions": "l1+[:2]", "site": "text"}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(saved):
    with np.load(saved / "expected.npz", allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


@pytest.fixture
def work(saved, tmp_path):
    """Return a function that copies a recorded folder, to be spoilt."""
    return lambda name: Path(shutil.copytree(saved / name, tmp_path / name))


def base(expected, kind="llama"):
    cls, config = KINDS[kind]
    model = cls(config(**json.loads(str(expected[f"config/{kind}"]))))
    prefix = f"base/{kind}/"
    state = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in expected.items() if k.startswith(prefix)}
    model.load_state_dict(state)
    return model.eval()


def outputs(model, expected, mask=None):
    ids_BL = torch.from_numpy(expected["ids"])
    with torch.no_grad():
        mask_BL = torch.ones_like(ids_BL) if mask is None else torch.from_numpy(expected[mask])
        return model(input_ids=ids_BL, attention_mask=mask_BL)[0]


def close(actual, wanted):
    torch.testing.assert_close(actual, torch.from_numpy(wanted), atol=1e-5, rtol=1e-5)


# What they give ------------------------------------------------------------------------------------------------------


def test_every_recorded_case_is_compared(saved, expected):
    for library, cases in (("pyreft", PYREFT), ("adapterhub", ADAPTERHUB)):
        assert {path.name for path in (saved / library).iterdir()} == set(cases)
        assert {name.split("/")[1] for name in expected if name.startswith(f"{library}/")} == set(cases)
    assert ARCHIVE.stat().st_size < 300_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_bases_agree(kind, expected):
    close(outputs(base(expected, kind), expected), expected[f"plain/{kind}"])


@pytest.mark.parametrize("case", PYREFT)
def test_pyreft_gives_what_it_gave_there(case, saved, expected, tmp_path):
    positions, settings, method, tied = PYREFT[case]
    model = base(expected)
    plain, wanted = outputs(model, expected), expected[f"pyreft/{case}"]
    assert not np.allclose(wanted, plain, atol=1e-2), "or the base would be compared with itself"
    reft = vlreft.import_pyreft(model, saved / "pyreft" / case, positions, **settings)
    close(outputs(model, expected), wanted)
    (item,) = reft.config.interventions
    assert (item.method, item.tied, item.positions) == (method, tied, positions)
    assert reft.config.modules_to_save == (("lm_head",) if case == "trainer" else ())
    assert_ours(reft, model, expected, tmp_path)
    assert torch.equal(outputs(model, expected), plain)


@pytest.mark.parametrize("case", ADAPTERHUB)
def test_adapterhub_gives_what_it_gave_there(case, saved, expected, tmp_path):
    settings, item = ADAPTERHUB[case]
    kind = "bert" if case == "bert" else "llama"
    model = base(expected, kind)
    plain = outputs(model, expected)
    reft = vlreft.import_adapterhub(model, saved / "adapterhub" / case, **settings)
    close(outputs(model, expected), expected[f"adapterhub/{case}"])
    mask_BL = torch.from_numpy(expected["mask"])
    padded, wanted = outputs(model, expected, "mask"), torch.from_numpy(expected[f"adapterhub/{case}/padded"])
    close(padded[mask_BL == 1], wanted[mask_BL == 1].numpy())
    assert not torch.allclose(padded, outputs_without(reft, model, expected), atol=1e-2)
    (made,) = reft.config.interventions
    assert {name: getattr(made, name) for name in item} == item
    assert reft.config.modules_to_save == (("lm_head",) if case == "loreft" else ())
    assert_ours(reft, model, expected, tmp_path)
    assert torch.equal(outputs(model, expected), plain)


def outputs_without(reft, model, expected):
    with reft.disabled():
        return outputs(model, expected, "mask")


def assert_ours(reft, model, expected, folder):
    """It can be saved and loaded as an adapter of ours, to the same outputs bit for bit; the model ends as the base."""
    edited = outputs(model, expected)
    reft.save_pretrained(folder / "ours")
    reft.detach()
    reft = vlreft.load(model, folder / "ours")
    assert torch.equal(outputs(model, expected), edited)
    reft.detach()


@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (8, 3), (7, 8), (8, 8)])
def test_orthogonal_weights_are_torchs(shape):
    """By torch's own parametrization, off its start; of a square one it is another formula."""
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(shape[1], shape[0], bias=False))
    held = layer.parametrizations.weight
    with torch.no_grad():
        noise = 0.3 * torch.randn(shape)
        held.original.add_(noise.triu(1) if shape[0] < shape[1] else noise.tril(-1))
    found = orthogonal_weight(held.original.detach(), held[0].base, "here")
    torch.testing.assert_close(found, layer.weight.detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, held[0].base[: shape[0], : shape[1]], atol=1e-2)


def test_older_pyreft_files_have_dots(work, expected):
    folder = work("pyreft/loreft")
    for path in folder.glob("*.bin"):
        name = path.name.removeprefix("intkey_").replace("block_output", "block-output")
        path.rename(folder / f"intkey_{name.replace('_', '.').replace('block-output', 'block_output')}")
    assert (folder / "intkey_layer.0.comp.block_output.unit.pos.nunit.1#0.bin").is_file()
    model = base(expected)
    vlreft.import_pyreft(model, folder, "f2+l2")
    close(outputs(model, expected), expected["pyreft/loreft"])


@pytest.mark.parametrize("case", ["direft", "noreft", "consreft"])
def test_without_a_config_the_method_has_to_be_said(case, work, expected):
    folder, model = work(f"pyreft/{case}"), base(expected)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json, and the numbers do not say which .* write `method`"):
        vlreft.import_pyreft(model, folder, PYREFT[case][0])
    vlreft.import_pyreft(model, folder, PYREFT[case][0], method=case)
    close(outputs(model, expected), expected[f"pyreft/{case}"])


def test_half_precision_is_widened(work, expected):
    """pyreft's W is bfloat16 unless one says otherwise."""
    folder, model = work("pyreft/loreft"), base(expected)
    for path in folder.glob("*.bin"):
        torch.save({k: v.to(torch.bfloat16) for k, v in torch.load(path, weights_only=True).items()}, path)
    reft = vlreft.import_pyreft(model, folder, "f2+l2")
    assert {parameter.dtype for parameter in reft.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(model, expected), torch.from_numpy(expected["pyreft/loreft"]), atol=3e-2, rtol=0)


def test_heads_can_be_left_out(saved, expected):
    for library, case in (("pyreft", "trainer"), ("adapterhub", "loreft")):
        model, folder = base(expected), saved / library / case
        if library == "pyreft":
            reft = vlreft.import_pyreft(model, folder, "l1", head=False)
        else:
            reft = vlreft.import_adapterhub(model, folder, head=False)
        assert reft.config.modules_to_save == ()
        assert np.abs(outputs(model, expected).numpy() - expected[f"{library}/{case}"]).max() > 1e-3


def test_a_head_that_is_the_bases_own_is_no_head(work, expected):
    folder, model = work("adapterhub/bert"), base(expected, "bert")
    save_file({"pooler.dense.weight": model.pooler.dense.weight.detach()}, folder / "model_head.safetensors")
    assert vlreft.import_adapterhub(model, folder).config.modules_to_save == ()


def test_a_head_of_another_class_is_refused(work, expected):
    folder, model = work("adapterhub/bert"), base(expected, "bert")
    save_file({"heads.mine.1.weight": torch.zeros(2, 16)}, folder / "model_head.safetensors")
    with untouched(model), pytest.raises(ValueError, match=r"holds \['heads.mine.1.weight'\], .* write head=False"):
        vlreft.import_adapterhub(model, folder)
    vlreft.import_adapterhub(model, folder, head=False)


def test_the_blocks_are_found_behind_a_head(saved, expected):
    """AdapterHub saved it from a BertModel; here the blocks are one name deeper."""
    config = BertConfig(**json.loads(str(expected["config/bert"])))
    model = BertForSequenceClassification(config).eval()
    model.bert.load_state_dict(base(expected, "bert").state_dict())
    vlreft.import_adapterhub(model, saved / "adapterhub" / "bert")
    ids_BL = torch.from_numpy(expected["ids"])
    with torch.no_grad():
        states_BLD = model(input_ids=ids_BL, output_hidden_states=True).hidden_states[-1]
    close(states_BLD, expected["adapterhub/bert"])


def test_beside_another_adapter_under_a_name(saved, expected):
    model = base(expected)
    vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", rank=2)))  # an identity
    reft = vlreft.import_pyreft(model, saved / "pyreft" / "loreft", "f2+l2", name="old")
    close(outputs(model, expected), expected["pyreft/loreft"])
    assert reft.name == "old"


# What nobody has to trust --------------------------------------------------------------------------------------------


class Evil:
    """Unpickled as objects are, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def spoil(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


def pyreft_file(folder):
    return folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"


def packed(path):
    """Return an archive of torch's with its entries compressed, as a bomb would have them."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path.read_bytes()


@pytest.mark.parametrize("how", ["in an archive", "alone", "as a tensor"])
def test_a_malicious_pickle_is_refused_and_not_run(how, work, expected, tmp_path):
    mark, model = tmp_path / "mark", base(expected)
    spoilt = Evil(mark)
    content = {"in an archive": {"weight": spoilt}, "alone": pickle.dumps(spoilt), "as a tensor": spoilt}[how]
    pyreft, adapterhub = work("pyreft/loreft"), work("adapterhub/loreft_prefix")
    spoil(pyreft_file(pyreft), content)
    spoil(adapterhub / "pytorch_adapter.bin", content)
    message = "is no archive of torch.save" if how == "alone" else "holds more than tensors, of which nothing was run"
    with half_frozen(model), untouched(model), pytest.raises(ValueError, match=message):
        vlreft.import_pyreft(model, pyreft, "f2+l2")
    with half_frozen(model), untouched(model), pytest.raises(ValueError, match=message):
        vlreft.import_adapterhub(model, adapterhub)
    assert not mark.exists()
    path = pyreft_file(pyreft)
    torch.load(path, weights_only=False) if how != "alone" else pickle.loads(content)
    assert mark.exists(), "or nothing would have been shown"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no archive of torch.save"),
        (b"PK", "is no archive of torch.save"),
        (b"\0" * 3_000_000, r"has 3,000,000 bytes, more than edits of this base can have"),
        ([torch.zeros(2)], "must hold tensors by name, got list"),
        ({"weight": 3}, "must hold tensors by name, got int as 'weight'"),
        ({"weight": {"a": torch.zeros(2)}}, "must hold tensors by name, got dict as 'weight'"),
        pytest.param(
            {"weight": torch.zeros(2).to_sparse()},
            "must hold tensors by name, got Tensor as 'weight'",
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
        ),
        (
            {"weight": torch.zeros(1).expand(10_000, 10_000)},
            r"'weight' cannot be the torch.float32 of \(10000, 10000\)",
        ),
        ({"weight": torch.zeros(2, dtype=torch.complex64)}, "'weight' cannot be the torch.complex64"),
    ],
)
def test_what_is_no_file_of_tensors(content, message, work, expected):
    folder, model = work("pyreft/loreft"), base(expected)
    spoil(pyreft_file(folder), content)
    with half_frozen(model), untouched(model), pytest.raises(ValueError, match=message):
        vlreft.import_pyreft(model, folder, "f2+l2")


def test_an_archive_cut_off_or_compressed_is_refused(saved, tmp_path):
    whole = pyreft_file(saved / "pyreft" / "loreft").read_bytes()
    path = tmp_path / "x.bin"
    for end in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"is no archive of torch\.save"):
            read_tensors(path, 10**6)
    path.write_bytes(whole)
    path.write_bytes(packed(path))
    with pytest.raises(ValueError, match="it is compressed"):
        read_tensors(path, 10**6)


def test_an_archive_with_a_wrong_byte_is_an_error_of_ours_or_other_numbers(saved, tmp_path):
    whole = pyreft_file(saved / "pyreft" / "loreft").read_bytes()
    path, refused = tmp_path / "x.bin", 0
    for place in range(0, len(whole), 23):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            read_tensors(path, 10**6)
        except ValueError:
            refused += 1
    assert refused > 20


# What does not fit ---------------------------------------------------------------------------------------------------


def change(path, edit):
    """Change a file of tensors, or of JSON, in place."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        edit(data)
        path.write_text(json.dumps(data))
    else:
        data = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        data = dict(data)
        edit(data)
        save_file(data, path) if path.suffix == ".safetensors" else torch.save(data, path)


def types(*names):
    return lambda data: data.update(intervention_types=[f"<class 'pyreft.interventions.{name}'>" for name in names])


BIN = "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"


@pytest.mark.parametrize(
    ("file", "edit", "positions", "message"),
    [
        (BIN, lambda t: t.pop("bias"), "f2+l2", r"#0.bin holds other tensors: missing \['bias'\], surplus \[\]"),
        (BIN, lambda t: t.update(x=torch.zeros(1)), "f2+l2", r"missing \[\], surplus \['x'\]"),
        (BIN, lambda t: t.update(bias=torch.zeros(2, 2)), "f2+l2", r"'bias' is torch.float32 of \(2, 2\)"),
        (BIN, lambda t: t.update(bias=torch.zeros(2).int()), "f2+l2", r"'bias' is torch.int32 of \(2,\)"),
        (BIN, lambda t: t["rotate_layer"].mul_(1.1), "f2+l2", r"the rows of R are not orthonormal \(off by 0.21\)"),
        (BIN, lambda t: t["rotate_layer"].zero_(), "f2+l2", "weight decay does that"),
        (BIN, lambda t: t["rotate_layer"].fill_(torch.nan), "f2+l2", "off by nan"),
        (BIN, lambda t: t.update(rotate_layer=torch.zeros(2, 16)), "f2+l2", r"R of \(16, 2\) cannot have orthonormal"),
        (
            BIN,
            lambda t: t.update(weight=torch.zeros(2, 8)),
            "f2+l2",
            r"the pyreft folder .* has shape \(2, 8\) in the fi",
        ),
        (BIN, lambda _: None, "f4", r"has 2 interventions for a layer, a prefix's and a suffix's; write e.g. 'f7\+l7'"),
        (BIN, lambda _: None, "l2+f2", r"has 2 interventions for a layer, a prefix's and a suffix's"),
        (BIN, lambda _: None, "patches", "has no segment 'patches'|has 2 interventions"),
        ("config.json", types("LoreftIntervention", "NoreftIntervention"), "f2+l2", "has interventions .'Loreft"),
        ("config.json", types("MyIntervention"), "f2+l2", r"has interventions \['MyIntervention'\]; one of"),
        ("config.json", lambda d: d.update(intervention_types=None), "f2+l2", "one of .* can be imported"),
        (
            "config.json",
            types("NoreftIntervention"),
            "f2+l2",
            r"missing \['learned_source.bias', .*'proj_layer.weight'\]",
        ),
        ("config.json", lambda d: d["representations"][0].__setitem__(9, 0), "f2+l2", "links interventions"),
        ("config.json", lambda d: d["sorted_keys"].sort(), "f2+l2", "prefix and suffix of a layer follow each other"),
    ],
)
def test_a_pyreft_folder_that_does_not_fit(file, edit, positions, message, work, expected):
    folder, model = work("pyreft/loreft"), base(expected)
    change(folder / file, edit)
    with half_frozen(model), untouched(model), pytest.raises(ValueError, match=message):
        vlreft.import_pyreft(model, folder, positions)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "intkey_layer_0_comp_head_attention_value_output_unit_h.pos_nunit_1#0.bin",
            "is no intervention on token positio",
        ),
        ("intkey_layer_0_comp_query_output_unit_pos_nunit_1#0.bin", "component 'query_output' is none of"),
        ("intkey_comp_model_layers_unit_pos_nunit_1#0.bin", "component 'model_layers' is none of"),
        ("intkey_layer_9_comp_block_output_unit_pos_nunit_1#0.bin", "layer 9 is out of range"),
        ("intkey_layer_0_comp_block_output_unit_pos_nunit_1#2.bin", "the files of layer 0 are numbered .0, 1, 2.|1, 2"),
        ("intkey_layer.0.comp.block_output.unit.pos.nunit.1#1.bin", "has two files for one intervention"),
    ],
)
def test_a_pyreft_file_of_another_name(name, message, work, expected):
    folder, model = work("pyreft/loreft"), base(expected)
    shutil.copy(folder / BIN, folder / name)
    if "#2" in name:
        (folder / BIN).unlink()
    with half_frozen(model), untouched(model), pytest.raises(ValueError, match=message):
        vlreft.import_pyreft(model, folder, "f2+l2")


def test_pyreft_misuse(saved, expected, tmp_path):
    model, other, folder = base(expected), llama(width=8), saved / "pyreft" / "noreft"
    with half_frozen(model), untouched(model):
        for path, settings, message in (
            (tmp_path, {}, r"no pyreft interventions in .*checkpoint-N/intervenable_model"),
            (folder, {"method": "red"}, r"`method` \(='red'\) must be one of"),
            (folder, {"method": "loreft"}, r"`method` \(='loreft'\) is not what .*config.json says: 'noreft'"),
            (folder, {"activation": "relu"}, "has a second bias, behind the activation 'relu'"),
            (folder, {"site": "nowhere"}, "nowhere"),
        ):
            with pytest.raises(ValueError, match=message):
                vlreft.import_pyreft(model, path, "f2+l2", **settings)
        with pytest.raises(ValueError, match=r"must be at most|has shape|out of range"):
            vlreft.import_pyreft(other, saved / "pyreft" / "loreft", "f2+l2")


def settings_of(**changes):
    return lambda data: data["config"].update(changes)


@pytest.mark.parametrize(
    ("case", "file", "edit", "message"),
    [
        (
            "loreft_tied",
            "adapter_config.json",
            settings_of(architecture="lora"),
            "only adapters of architecture 'reft'.*'lora'",
        ),
        ("loreft_tied", "adapter_config.json", lambda d: d.update(config=None), "only adapters of .* got None"),
        ("loreft_tied", "adapter_config.json", settings_of(r="2"), "of another kind"),
        ("loreft_tied", "adapter_config.json", settings_of(r=0), "`rank` .=0. must be at least 1"),
        ("loreft_tied", "adapter_config.json", settings_of(orthogonality=None), "of another kind"),
        ("loreft_tied", "adapter_config.json", settings_of(prefix_positions=-1), "of another kind"),
        (
            "loreft_tied",
            "adapter_config.json",
            settings_of(prefix_positions=0, suffix_positions=0),
            "edits no positions",
        ),
        (
            "loreft_tied",
            "adapter_config.json",
            settings_of(non_linearity="gelu_new"),
            "non_linearity 'gelu_new' is none",
        ),
        ("loreft_tied", "adapter_config.json", settings_of(dropout=2), "`dropout`"),
        ("loreft_tied", "adapter_config.json", settings_of(tied_weights=False), "unit 1 holds other tensors: missing"),
        ("loreft_tied", "adapter_config.json", settings_of(r=3), r"has shape \(2, 16\) in the file and \(3, 16\)"),
        (
            "loreft_tied",
            "adapter_config.json",
            settings_of(orthogonality=False),
            "write method='noreft' or method='nodireft'",
        ),
        (
            "loreft_tied",
            "adapter.safetensors",
            lambda t: t.update({"a.loras.x": torch.ones(1)}),
            "'a.loras.x' is no tensor of",
        ),
        ("loreft_tied", "adapter.safetensors", lambda t: t.popitem(), "holds other tensors: missing"),
        (
            "direft",
            "adapter_config.json",
            lambda _: None,
            "does not say whether it was made with NoReftConfig or DiReftC",
        ),
    ],
)
def test_an_adapterhub_folder_that_does_not_fit(case, file, edit, message, work, expected):
    folder, model = work(f"adapterhub/{case}"), base(expected)
    change(folder / file, edit)
    with half_frozen(model), untouched(model), pytest.raises(ValueError, match=message):
        vlreft.import_adapterhub(model, folder)


def test_adapterhub_says_it_when_the_config_does(work, expected):
    """A library that saved the missing word would be believed."""
    folder, model = work("adapterhub/direft"), base(expected)
    change(folder / "adapter_config.json", settings_of(subtract_projection=False))
    vlreft.import_adapterhub(model, folder)
    close(outputs(model, expected), expected["adapterhub/direft"])


def test_a_direft_read_as_noreft_is_another_edit(saved, expected):
    """Which is what AdapterHub itself makes of it, and why the method has to be said."""
    model = base(expected)
    vlreft.import_adapterhub(model, saved / "adapterhub" / "direft", method="noreft")
    assert np.abs(outputs(model, expected).numpy() - expected["adapterhub/direft"]).max() > 1e-3


def test_weight_decay_is_found_in_adapterhubs_file(work, expected):
    folder, model = work("adapterhub/loreft_tied"), base(expected)
    name = "model.layers.0.reft_layer.refts.mine.units.0.projection.parametrizations.weight.original"
    change(folder / "adapter.safetensors", lambda tensors: tensors[name].mul_(0.99))
    with untouched(model), pytest.raises(ValueError, match=r"not orthonormal \(off by 1\).* weight decay does that"):
        vlreft.import_adapterhub(model, folder)


def test_adapterhub_misuse(saved, expected, tmp_path):
    model, folder = base(expected), saved / "adapterhub" / "loreft_tied"
    with untouched(model):
        for path, settings, message in (
            (tmp_path, {}, "no adapter of AdapterHub's in .*: there is no adapter_config.json"),
            (folder, {"method": "nodireft"}, r"`method` \(='nodireft'\) must be one of \('loreft', 'direft'\)"),
            (folder, {"site": "nowhere"}, "nowhere"),
            (saved / "adapterhub" / "bert", {}, r"edits the blocks at 'encoder.layer', LlamaForCausalLM has them at"),
        ):
            with pytest.raises(ValueError, match=message):
                vlreft.import_adapterhub(model, path, **settings)
        shutil.copy(folder / "adapter_config.json", tmp_path)
        with pytest.raises(ValueError, match=r"there is none of adapter.safetensors, pytorch_adapter.bin"):
            vlreft.import_adapterhub(model, tmp_path)


def test_a_site_that_is_named_need_not_be_found(saved, expected):
    """The one who names it says that the paths mean the same blocks."""
    model = base(expected)
    vlreft.import_adapterhub(model, saved / "adapterhub" / "bert", site="text")
    assert not np.allclose(outputs(model, expected), expected["plain/llama"], atol=1e-3)
