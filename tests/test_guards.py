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
    "layout": set(),
    "edit": set(),
    "causal": {"edit"},
    "interventions": {"causal", "edit"},
    "stacks": set(),
    "components": set(),
    "samples": set(),
    "outputs": set(),
    "prompts": set(),
    "data": {"samples"},
    "files": set(),
    "answers": set(),
    "stores": set(),
    "caches": set(),
    "rows": {"prefix"},
    "questions": {"caches", "data", "hooks", "layout", "prefix", "reft", "rows", "streams"},
    "pieces": {"stores"},
    "features": {"hooks", "pieces", "reft", "sites", "stacks", "stores"},
    "published": {"config"},
    "recipes": {"config", "published"},
    "datasets": {"files"},
    "quirks": {"stacks"},
    "selects": {"layout"},
    "positions": {"layout", "selects"},
    "sites": {"components", "layout", "quirks", "stacks"},
    "config": {"components", "edit", "interventions", "positions"},
    "placed": {"edit", "positions"},
    "acting": {"placed", "positions"},
    "several": {"reft"},
    "blocks": {"components"},
    "streams": {"layout", "placed", "positions"},
    "pictures": {"layout", "sites"},
    "towers": {"layout", "placed", "positions", "selects", "sites"},
    "batches": {"layout", "placed", "sites", "streams"},
    "hooks": {
        *("batches", "blocks", "components", "layout", "pictures", "placed", "positions"),
        *("outputs", "prompts", "sites", "streams", "towers"),
    },
    "heads": {"components", "hooks", "outputs", "placed", "sites"},
    "checkpoint": {"config"},
    "plan": {"components", "config", "edit", "sites"},
    "reft": {
        *("acting", "checkpoint", "config", "edit", "heads", "hooks", "layout", "placed", "plan", "positions", "sites"),
    },
    "empty": {"stacks"},
    "description": {"components", "config", "empty", "plan", "reft", "sites"},
    "describe": {"description"},
    "grouping": set(),
    "cuts": {"pieces"},
    "kept": {"pieces", "stores"},
    "prefix": {"cuts", "kept", "layout", "pieces", "reft", "selects", "streams"},
    "trainer": {"answers", "contrast", "data", "grouping", "kept", "layout", "prefix", "reft"},
    "contrast": {"samples"},
    "__init__": {
        "config",
        "contrast",
        "data",
        "description",
        "features",
        "questions",
        "recipes",
        "reft",
        "several",
        "trainer",
    },
}

PUBLIC = {
    *(
        "ClassCollator",
        "Collator",
        "FeatureCache",
        "Intervention",
        "PairCollator",
        "Questions",
        "Reft",
        "ReftConfig",
        "ReftMixin",
        "ReftTrainer",
    ),
    *("attach", "contrastive_loss", "describe", "load", "recipe", "use", "zero_shot"),
}

MAX_LINES = 450
FORBIDDEN_IMPORTS = {
    "cloudpickle", "dill", "http", "importlib", "joblib", "marshal", "pickle", "requests", "shelve", "socket",
    "subprocess", "urllib",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
KNOWN_HOSTS = {"arxiv.org", "doi.org", "github.com", "huggingface.co", "www.apache.org"}
# Where data sets are downloaded; named in `sources`, never loaded from.
HOMES_OF_DATA = {
    *("cocodataset.org", "cs.stanford.edu", "gluebenchmark.com", "nocaps.org", "okvqa.allenai.org"),
    *("shannon.cs.illinois.edu", "textvqa.org", "visualqa.org", "vizwiz.org", "www.robots.ox.ac.uk"),
}
MADE_UP_HOSTS = {"example.org", "site.org", "x.net"}  # in texts of tests
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
    assert not {name.split(".")[0] for name in imports(path)} & FORBIDDEN_IMPORTS
    called = {ast.unparse(call.func) for call in nodes(path, ast.Call)}
    assert not called & FORBIDDEN_CALLS
    assert "trust_remote_code" not in path.read_text()


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
            known = {"tasks": HOMES_OF_DATA, "tests": MADE_UP_HOSTS}.get(path.relative_to(ROOT).parts[0], set())
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
