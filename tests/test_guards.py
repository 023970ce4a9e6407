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
    "data.files": set(),
    "data.samples": set(),
    "drawing.glyphs": set(),
    "edit": set(),
    "layout": set(),
    "models.components": set(),
    "models.stacks": set(),
    "reuse.caches": set(),
    "reuse.changes": set(),
    "reuse.grouping": set(),
    "reuse.stores": set(),
    "running.endings": set(),
    "running.outputs": set(),
    "running.prompts": set(),
    "saving.shards": set(),
    "training.answers": set(),
    "training.interrupts": set(),
    "training.watch": set(),
    "causal": {"edit"},
    "holding": {"edit"},
    "data.collator": {"data.samples"},
    "data.contrast": {"data.samples"},
    "data.datasets": {"data.files"},
    "drawing.sheets": {"drawing.glyphs"},
    "models.empty": {"models.stacks"},
    "models.quirks": {"models.stacks"},
    "reuse.pieces": {"reuse.stores"},
    "running.blocks": {"models.components"},
    "selects": {"layout"},
    "interventions": {"causal", "edit"},
    "models.sites": {"layout", "models.components", "models.quirks", "models.stacks"},
    "positions": {"layout", "selects"},
    "reuse.cuts": {"reuse.pieces"},
    "reuse.kept": {"reuse.changes", "reuse.pieces", "reuse.stores"},
    "config": {"edit", "interventions", "models.components", "positions"},
    "drawing.shown": {"models.sites"},
    "placed": {"edit", "positions"},
    "running.pictures": {"layout", "models.sites"},
    "plan": {"config", "edit", "models.components", "models.sites"},
    "published": {"config"},
    "running.beside": {"placed"},
    "running.streams": {"layout", "placed", "positions"},
    "running.towers": {"layout", "models.sites", "placed", "positions", "selects"},
    "saving.card": {"config"},
    "recipes": {"config", "published"},
    "running.batches": {"layout", "models.sites", "placed", "running.streams"},
    "running.heads": {"models.components", "models.sites", "placed", "running.beside", "running.outputs"},
    "saving.checkpoint": {"config", "models.sites", "plan", "saving.card", "saving.shards"},
    "running.hooks": {
        *("layout", "models.components", "models.sites", "placed", "positions", "running.batches"),
        *("running.beside", "running.blocks", "running.outputs", "running.pictures", "running.prompts"),
        *("running.streams", "running.towers"),
    },
    "acting": {"placed", "positions", "running.endings", "running.hooks"},
    "saving.hub": {"saving.card", "saving.checkpoint"},
    "training.folders": {"saving.checkpoint"},
    "reft": {
        *("acting", "config", "holding", "layout", "models.sites", "placed", "plan", "positions"),
        *("running.beside", "running.heads", "running.hooks", "saving.card", "saving.checkpoint"),
        *("saving.hub", "saving.shards"),
    },
    "training.faults": {"saving.checkpoint", "training.folders", "training.interrupts", "training.watch"},
    "attaching": {
        *("config", "edit", "models.sites", "placed", "plan", "reft", "running.beside", "running.heads"),
        *("running.hooks", "saving.checkpoint", "saving.hub"),
    },
    "causes.boundless": {"causal", "reft"},
    "causes.subspaces": {"causal", "edit", "interventions", "reft"},
    "drawing.traces": {
        *("acting", "layout", "models.sites", "positions", "reft", "running.hooks", "running.pictures"),
        *("running.towers",),
    },
    "reuse.features": {
        *("models.sites", "models.stacks", "reft", "reuse.changes", "reuse.pieces", "reuse.stores", "running.hooks"),
    },
    "reuse.prefix": {
        *("layout", "reft", "reuse.caches", "reuse.cuts", "reuse.kept", "reuse.pieces", "running.endings"),
        *("running.streams", "selects"),
    },
    "several": {"reft"},
    "training.sharding": {"reft", "running.beside"},
    "training.twins": {"reft"},
    "drawing.maps": {"acting", "drawing.shown", "drawing.traces", "layout", "reft", "running.hooks"},
    "merging": {"attaching", "config", "edit", "interventions", "reft"},
    "models.description": {"attaching", "config", "models.components", "models.empty", "models.sites", "plan", "reft"},
    "reuse.rows": {"reuse.prefix"},
    "saving.foreign": {"attaching", "config", "models.sites", "plan", "reft", "saving.card", "saving.checkpoint"},
    "causes.directions": {
        *("acting", "attaching", "config", "data.collator", "data.samples", "interventions", "positions"),
        *("reft", "reuse.rows"),
    },
    "causes.interchange": {
        *("acting", "attaching", "config", "data.collator", "layout", "placed", "positions", "reft"),
        *("reuse.rows", "running.hooks"),
    },
    "describe": {"models.description"},
    "drawing.plots": {"drawing.glyphs", "drawing.maps", "drawing.sheets", "reft"},
    "reuse.questions": {
        *("data.collator", "layout", "reft", "reuse.caches", "reuse.prefix", "reuse.rows", "running.endings"),
        *("running.hooks", "running.streams"),
    },
    "saving.adapterhub": {"config", "models.sites", "reft", "saving.checkpoint", "saving.foreign"},
    "saving.pyreft": {"config", "positions", "reft", "saving.checkpoint", "saving.foreign"},
    "training.trainer": {
        *("causes.interchange", "data.collator", "data.contrast", "layout", "reft", "reuse.grouping"),
        *("reuse.kept", "reuse.prefix", "reuse.questions", "running.beside", "training.answers", "training.faults"),
        *("training.sharding",),
    },
    "__init__": {
        *("attaching", "causes.boundless", "causes.directions", "causes.interchange", "causes.subspaces"),
        *("config", "data.collator", "data.contrast", "drawing.plots", "merging", "models.description"),
        *("recipes", "reft", "reuse.features", "reuse.kept", "reuse.questions", "saving.adapterhub", "saving.pyreft"),
        *("several", "training.trainer", "training.twins"),
    },
}

PUBLIC = {
    *("BoundlessSchedule", "ClassCollator", "Collator", "FeatureCache", "InterchangeCollator"),
    *("Intervention", "KeptPrefixes", "PairCollator", "Questions", "Reft", "ReftConfig", "ReftMixin", "ReftTrainer"),
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

SOURCES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = [path for path in SOURCES if path.name == "__init__.py" and path.parent != PACKAGE]
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in SOURCES if path not in PACKAGES}
by_file = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


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


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
    assert module in ARROWS, f"vlreft.{module} is new: say in ARROWS what it may import"
    names = imports(MODULES[module])
    ours = {name.removeprefix("vlreft.") for name in names if name.startswith("vlreft.")}
    assert {name if name in MODULES else name.rpartition(".")[0] for name in ours} <= ARROWS[module]
    assert not {name.split(".")[0] for name in names} & {"assets", "examples", "tasks", "tests"}


def test_arrows_have_no_cycle_and_no_dead_row():
    tuple(graphlib.TopologicalSorter(ARROWS).static_order())
    assert set(ARROWS) == set(MODULES)


def test_packages_are_a_sentence():
    for path in PACKAGES:
        (sentence,) = ast.parse(path.read_text()).body
        assert isinstance(sentence, ast.Expr), path


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
        "import vlreft\nbefore = 'vlreft.training.trainer' in sys.modules\nfrom vlreft import ReftTrainer, ReftMixin\n"
        "after = 'transformers.trainer' in sys.modules\n"
        "print(json.dumps([before, ReftTrainer.__module__, ReftMixin.__module__, after]))"
    )
    assert names == [False, "vlreft.training.trainer", "vlreft.training.trainer", True]


def test_no_tensor_of_width_squared():
    model = llama(width=512, num_hidden_layers=1)
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", rank=8)))
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("vlreft.")}
    assert sum(tensor.numel() for tensor in state.values()) == reft.num_parameters() == 2 * 8 * 512 + 8
    assert torch.tensor([tensor.numel() for tensor in state.values()]).max() == 8 * 512
