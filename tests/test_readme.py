"""The README's code is run, block after block, as a reader would type it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def in_project_root(tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_project_root")
def test_python_blocks_run_in_order():
    namespace = {}
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    assert Path("runs/readme/adapter/reft_model.safetensors").is_file()
    assert namespace["reft"].is_attached


def test_files_of_the_tour_exist():
    tour = README.partition("## Guided tour")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+`) \|", tour, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([a-z_/*.]+)`", row.partition(" | ")[0])]
    assert [name for name in named if not any(ROOT.glob(name))] == []
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vlreft").rglob("*.py")}
    assert {name for name in modules if not name.endswith("__init__.py")} <= set(named)


def test_pictures_of_the_readme_exist():
    assert all((ROOT / name).is_file() for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README))


def test_both_commands_stand_in_the_readme():
    assert "\npip install -e . && python examples/finetune_vqa.py\n" in README
    assert '\npip install -e ".[test]" && pytest\n' in README


@pytest.mark.slow
def test_the_table_of_families_is_what_its_command_prints():
    from table import everything, summary

    assert "\n".join(summary(everything())) in README
