"""Rules of the code base that a machine can check: who imports whom, what is public, what never happens."""

import ast
import functools
import graphlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import llama

import vlreft

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vlreft"

# Which module may import which. A new arrow is a decision: it goes in here or it does not happen.
ARROWS = {
    "answers": set(),
    "edit": set(),
    "layout": set(),
    "components": set(),
    "caches": set(),
    "shards": set(),
    "samples": set(),
    "files": set(),
    "stacks": set(),
    "watch": set(),
    "interrupts": set(),
    "stores": set(),
    "glyphs": set(),
    "grouping": set(),
    "outputs": set(),
    "prompts": set(),
    "causal": {"edit"},
    "selects": {"layout"},
    "blocks": {"components"},
    "contrast": {"samples"},
    "data": {"samples"},
    "datasets": {"files"},
    "empty": {"stacks"},
    "quirks": {"stacks"},
    "pieces": {"stores"},
    "sheets": {"glyphs"},
    "interventions": {"causal", "edit"},
    "positions": {"layout", "selects"},
    "sites": {"components", "layout", "quirks", "stacks"},
    "cuts": {"pieces"},
    "kept": {"pieces", "stores"},
    "config": {"components", "edit", "interventions", "positions"},
    "placed": {"edit", "positions"},
    "pictures": {"layout", "sites"},
    "shown": {"sites"},
    "plan": {"components", "config", "edit", "sites"},
    "published": {"config"},
    "acting": {"placed", "positions"},
    "beside": {"placed"},
    "streams": {"layout", "placed", "positions"},
    "towers": {"layout", "placed", "positions", "selects", "sites"},
    "card": {"config"},
    "checkpoint": {"card", "config", "plan", "shards", "sites"},
    "recipes": {"config", "published"},
    "heads": {"beside", "components", "outputs", "placed", "sites"},
    "batches": {"layout", "placed", "sites", "streams"},
    "folders": {"checkpoint"},
    "hub": {"card", "checkpoint"},
    "hooks": {
        *("batches", "beside", "blocks", "components", "layout", "outputs", "pictures", "placed", "positions"),
        *("prompts", "sites", "streams", "towers"),
    },
    "faults": {"checkpoint", "folders", "interrupts", "watch"},
    "reft": {
        *("acting", "beside", "card", "checkpoint", "config", "edit", "heads", "hooks", "hub", "layout", "placed"),
        *("plan", "positions", "shards", "sites"),
    },
    "boundless": {"causal", "reft"},
    "features": {"hooks", "pieces", "reft", "sites", "stacks", "stores"},
    "prefix": {"cuts", "kept", "layout", "pieces", "reft", "selects", "streams"},
    "several": {"reft"},
    "sharding": {"beside", "reft"},
    "subspaces": {"causal", "edit", "interventions", "reft"},
    "traces": {"acting", "hooks", "layout", "pictures", "positions", "reft", "sites", "towers"},
    "twins": {"reft"},
    "attaching": {
        *("beside", "checkpoint", "config", "edit", "heads", "hooks", "hub", "placed", "plan", "reft", "sites"),
    },
    "rows": {"prefix"},
    "merging": {"attaching", "config", "edit", "interventions", "reft"},
    "maps": {"acting", "hooks", "layout", "reft", "shown", "traces"},
    "foreign": {"attaching", "card", "checkpoint", "config", "plan", "reft", "sites"},
    "foreign_adapterhub": {"config", "foreign", "reft", "sites"},
    "foreign_pyreft": {"checkpoint", "config", "foreign", "positions", "reft"},
    "description": {"attaching", "components", "config", "empty", "plan", "reft", "sites"},
    "directions": {"acting", "attaching", "config", "data", "interventions", "positions", "reft", "rows", "samples"},
    "interchange": {
        *("acting", "attaching", "config", "data", "hooks", "layout", "placed", "positions", "reft", "rows"),
    },
    "questions": {"caches", "data", "hooks", "layout", "prefix", "reft", "rows", "streams"},
    "plots": {"glyphs", "maps", "reft", "sheets"},
    "describe": {"description"},
    "trainer": {
        *("answers", "beside", "contrast", "data", "faults", "grouping", "interchange", "kept", "layout"),
        *("prefix", "reft", "sharding"),
    },
    "__init__": {
        *("attaching", "boundless", "config", "contrast", "data", "description", "directions", "features"),
        *("foreign_adapterhub", "foreign_pyreft"),
        *(
            "interchange",
            "merging",
            "plots",
            "questions",
            "recipes",
            "reft",
            "several",
            "subspaces",
            "trainer",
            "twins",
        ),
    },
}

PUBLIC = {
    *("BoundlessSchedule", "ClassCollator", "Collator", "FeatureCache", "InterchangeCollator"),
    *("Intervention", "PairCollator", "Questions", "Reft", "ReftConfig", "ReftMixin", "ReftTrainer"),
    *("import_adapterhub", "import_pyreft"),
    *("attach", "contrastive_loss", "describe", "interchange_accuracy", "load", "merge", "patch_grid", "plot_edits"),
    *("plot_next_tokens", "plot_placement", "principal_angles", "recipe", "reference", "steer", "use"),
    "zero_shot",
}

MAX_LINES = 450
FORBIDDEN_IMPORTS = {
    "cloudpickle", "dill", "http", "importlib", "joblib", "marshal", "pickle", "requests", "shelve", "socket",
    "subprocess", "urllib",
}  # fmt: skip
# The one name of it that is no way to unpickle anything: an error, to be caught.
HARMLESS_IMPORTS = {"pickle.UnpicklingError"}
# `torch.load` runs what a file says, unless it is told to read tensors alone.
SAFE_ARGUMENT = "weights_only=True"
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
KNOWN_HOSTS = {"arxiv.org", "doi.org", "github.com", "huggingface.co", "www.apache.org"}
# Where data sets are downloaded; named in `sources`, never loaded from.
HOMES_OF_DATA = {
    *("cocodataset.org", "cs.stanford.edu", "gluebenchmark.com", "nocaps.org", "okvqa.allenai.org"),
    *("shannon.cs.illinois.edu", "textvqa.org", "visualqa.org", "vizwiz.org", "www.robots.ox.ac.uk"),
}
MADE_UP_HOSTS = {"example.org", "site.org", "x.net"}  # in texts of tests
THIS_MACHINE = {"127.0.0.1", "localhost"}  # processes of one training, and the page in `examples/`
BROUGHT_BY_OTHERS = "import torch, transformers; transformers.PreTrainedModel, transformers.GenerationMixin"
HEAVY = ("datasets", "matplotlib", "pandas", "peft", "pyarrow", "transformers.trainer")

SOURCES = sorted(PACKAGE.glob("*.py"))
by_file = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


@functools.cache
def parsed(path):
    return list(ast.walk(ast.parse(path.read_text())))


def nodes(path, *kinds):
    return [node for node in parsed(path) if isinstance(node, kinds)]


def imports(path):
    """Return the dotted names that a file imports anywhere in it, `from a import b` as a.b."""
    names = []
    for node in nodes(path, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path.name} line {node.lineno}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def tracked_files():
    """Return the repository's files, without what git ignores where there is git."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not path.relative_to(ROOT).parts[0].startswith(".")]


# Layers --------------------------------------------------------------------------------------------------------------


@by_file
def test_imports_follow_the_arrows(path):
    assert path.stem in ARROWS, f"vlreft/{path.name} is new: say in ARROWS what it may import"
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("vlreft.")}
    assert ours <= ARROWS[path.stem]
    assert not {name.split(".")[0] for name in imports(path)} & {"assets", "examples", "tasks", "tests"}


def test_arrows_have_no_cycle_and_no_dead_row():
    tuple(graphlib.TopologicalSorter(ARROWS).static_order())
    assert set(ARROWS) == {path.stem for path in SOURCES}


# What never happens --------------------------------------------------------------------------------------------------


@by_file
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) < MAX_LINES


@by_file
def test_prints_are_waived_one_by_one(path):
    lines = path.read_text().splitlines()
    for call in nodes(path, ast.Call):
        if ast.unparse(call.func) == "print":
            assert "# noqa: T201" in " ".join(lines[call.lineno - 1 : call.end_lineno])


@by_file
def test_no_blanket_except(path):
    for handler in nodes(path, ast.ExceptHandler):
        assert handler.type is not None, f"line {handler.lineno}: a bare except"
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        assert not {ast.unparse(kind) for kind in kinds} & {"Exception", "BaseException"}


@by_file
def test_nothing_that_runs_foreign_code(path):
    assert not {name.split(".")[0] for name in set(imports(path)) - HARMLESS_IMPORTS} & FORBIDDEN_IMPORTS
    assert runs_foreign_code(nodes(path, ast.Call)) == []
    # Under another name, or handed on, what it is given would not be seen.
    loads = [node for node in nodes(path, ast.Attribute) if ast.unparse(node) == "torch.load"]
    assert len(loads) == sum(ast.unparse(call.func) == "torch.load" for call in nodes(path, ast.Call))
    assert not {name for name in imports(path) if name.startswith(("torch.load", "torch.serialization"))}
    assert "trust_remote_code" not in path.read_text()


def runs_foreign_code(calls):
    """Return the calls that run what somebody else wrote."""
    return [
        ast.unparse(call)
        for call in calls
        if ast.unparse(call.func) in FORBIDDEN_CALLS
        and not (ast.unparse(call.func) == "torch.load" and SAFE_ARGUMENT in map(ast.unparse, call.keywords))
    ]


@pytest.mark.parametrize(
    ("code", "is_fine"),
    [
        ("torch.load(path, weights_only=True)", True),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=is_safe)", False),
        ("torch.load(path, 'weights_only=True')", False),
        ("torch.load(path, **{'weights_only': True})", False),
        ("eval(text, weights_only=True)", False),
    ],
)
def test_the_guard_knows_a_safe_load_from_others(code, is_fine):
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert (runs_foreign_code(calls) == []) is is_fine


@by_file
def test_no_warning_where_an_error_is_due(path):
    assert "warnings" not in {name.split(".")[0] for name in imports(path)}


def test_no_absolute_paths_and_no_strange_hosts():
    local = re.compile(rb"(?<![\w.~-])/(?:work|root|home|mnt|tmp|var|Users)/")
    host = re.compile(r"\b[a-z]+://([\w-]+(?:\.[\w-]+)+)|\b(localhost)\b|\b(\d{1,3}(?:\.\d{1,3}){3})\b")
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        found += [f"{path.relative_to(ROOT)}: {match[0].decode()}" for match in local.finditer(content)]
        if b"\0" in content:
            continue
        for match in host.finditer(content.decode()):
            name = next(group for group in match.groups() if group)
            known = {"tasks": HOMES_OF_DATA, "tests": MADE_UP_HOSTS | THIS_MACHINE, "examples": THIS_MACHINE}.get(
                path.relative_to(ROOT).parts[0], set()
            )
            if name not in KNOWN_HOSTS | known and not name.endswith(".invalid") and path != Path(__file__):
                found.append(f"{path.relative_to(ROOT)}: {name}")
    assert found == []


# What is public, and what it costs -----------------------------------------------------------------------------------


def test_public_names():
    assert set(vlreft.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(vlreft, name).__doc__, name
    own = {name for name, value in vars(vlreft).items() if getattr(value, "__module__", "").startswith("vlreft.")}
    assert {name for name in own if not name.startswith("_")} <= PUBLIC
    with pytest.raises(AttributeError, match="module 'vlreft' has no attribute 'nothing'"):
        _ = vlreft.nothing


def run(code):
    """Run code in a fresh interpreter and return what it prints, as JSON."""
    code = f"import json, sys, time\n{code}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_brings_nothing():
    """Importing vlreft imports no library; its names bring theirs when they are first used."""
    new = run("before = set(sys.modules)\nimport vlreft\nprint(json.dumps(sorted(set(sys.modules) - before)))")
    assert {name.split(".")[0] for name in new} - set(sys.stdlib_module_names) == {"vlreft"}


def test_what_is_used_without_training_is_light():
    """Beyond what a transformers model in memory has brought already: no trainer, no datasets."""
    before, after = run(
        f"{BROUGHT_BY_OTHERS}\nbefore = set(sys.modules)\nimport vlreft\n"
        "vlreft.attach, vlreft.load, vlreft.ReftConfig, vlreft.Collator\n"
        "print(json.dumps([sorted(before), sorted(sys.modules)]))"
    )
    assert [name for name in HEAVY if name in after] == []
    new = {name.split(".")[0] for name in set(after) - set(before)} - set(sys.stdlib_module_names)
    assert new <= {"vlreft", "PIL", "safetensors", "transformers", "torch"}


def test_the_trainer_comes_when_it_is_asked_for():
    names = run(
        "import vlreft\nbefore = 'vlreft.trainer' in sys.modules\nfrom vlreft import ReftTrainer, ReftMixin\n"
        "after = 'transformers.trainer' in sys.modules\n"
        "print(json.dumps([before, ReftTrainer.__module__, ReftMixin.__module__, after]))"
    )
    assert names == [False, "vlreft.trainer", "vlreft.trainer", True]


def test_no_tensor_of_width_squared():
    model = llama(width=512, num_hidden_layers=1)
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", rank=8)))
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("vlreft.")}
    assert sum(tensor.numel() for tensor in state.values()) == reft.num_parameters() == 2 * 8 * 512 + 8
    assert torch.tensor([tensor.numel() for tensor in state.values()]).max() == 8 * 512
