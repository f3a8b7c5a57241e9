"""Documents are true: their code runs, their tables and maps are the code's, recipes and examples work on a tiny model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from intaglio.cli import app
from intaglio.runs import config as run_config
from support import tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def on_a_tiny_model(monkeypatch, tmp_path, tiny_folder):
    """In an empty folder, with the hub's model swapped for a tiny one on disk."""
    monkeypatch.chdir(tmp_path)
    return lambda code: code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", tiny_folder).replace("o=0.06", "o=0.25")


def test_readme_code_runs(on_a_tiny_model):
    for code in blocks(ROOT / "README.md", "python"):
        names: dict = {}
        exec(on_a_tiny_model(code), names)
        assert all(torch.isfinite(p).all() for p in names["fresh"].parameters())
    assert Path("adapter/adapter_config.json").exists()


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.name)
def test_python_in_the_docs_runs(page, on_a_tiny_model):
    for code in blocks(ROOT / "README.md", "python"):
        exec(on_a_tiny_model(code), {})  # leaves the adapter that docs/adapter-format.md loads
    names: dict = {}
    for code in blocks(page, "python"):
        exec(on_a_tiny_model(code), names)


def test_run_files_in_the_docs_are_valid(tmp_path):
    found = 0
    for page in PAGES:
        for text in blocks(page, "yaml"):
            path = tmp_path / "run.yaml"
            path.write_text(text)
            run_config.load_config(path, [] if "data:" in text else ["data.task=reasoning_gym/gcd"])
            found += 1
    assert found >= 2


def test_commands_in_the_docs_exist():
    """Every `intaglio …` and `make …` line names a real command, real options and valid overrides."""
    commands: Any = typer.main.get_command(app)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = set()
    for page in PAGES:
        for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)  # the command's environment
            if words[:1] == ["make"]:
                assert words[1] in targets
            if words[:1] == ["intaglio"]:
                command = commands.commands[words[1]]
                given = command.make_context(words[1], words[2:]).params  # refuses options that do not exist
                seen.add(words[1])
                run_config.load_config({"data": {"task": "reasoning_gym/gcd"}}, given.get("overrides") or [])
    assert seen == set(commands.commands)


def test_tables_are_what_the_code_gives():
    """Else `make tables` writes them."""
    sys.path.insert(0, str(ROOT / "docs"))
    import tables

    for (page, name), rows in tables.tables().items():
        assert (ROOT / page).read_text() == tables.written(page, name, rows), f"{page}: {name}: make tables"


def run(*command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_run(recipe, tmp_path, tiny_folder):
    settings = [f"model.name={tiny_folder}", "train.max_steps=2", "evaluate.limit=2", "method.o=0.25", "train.use_cpu=true"]
    run("-m", "intaglio", "train", recipe, *settings, cwd=tmp_path)
    assert (tmp_path / "runs" / recipe.stem / "adapter/adapter_config.json").exists()


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run_and_are_short(example, tmp_path, tiny_folder):
    assert len(example.read_text().splitlines()) < 60
    assert "logits equal" in run(example, tiny_folder, cwd=tmp_path)


def layers():
    """The layers of the import contract, the uppermost first; and the parts of the package that stand outside."""
    contract = (ROOT / "pyproject.toml").read_text()
    lines = re.search(r"^layers = \[\n(.*?)^\]", contract, re.MULTILINE | re.DOTALL)
    outside = re.search(r"^exhaustive_ignores = \[(.*?)\]", contract, re.MULTILINE)
    assert lines
    assert outside
    return re.findall(r'"(.+?)"', lines[1]), re.findall(r'"(.+?)"', outside[1])


def folders():
    return {path.parent.name for path in (ROOT / "src/intaglio").glob("*/__init__.py")}


def test_the_map_is_the_contract_and_the_folders():
    """CONTRIBUTING's map: every folder, in the order of the import contract, then those that stand alone."""
    order, outside = layers()
    inside = [name for layer in order for name in layer.split(" | ")]
    mapped = [line.partition("/")[0] for line in blocks(ROOT / "CONTRIBUTING.md", "text")[0].splitlines()]
    assert mapped == inside + [name for name in outside if name in folders()]
    assert set(mapped) == folders()


def test_the_architecture_page_names_what_there_is():
    """Its layers are the contract's; every folder is named; every module and every folder that it names exists."""
    page = ROOT / "docs/architecture.md"
    drawn = [re.split(r"\s{2,}", line)[0] for line in blocks(page, "text")[-1].splitlines()]
    assert drawn == layers()[0]
    named = re.findall(r"\b(\w+)/(\w*)", re.sub(r"\[.*?\]\(.*?\)", "", page.read_text()))
    assert {folder for folder, _ in named} == folders()
    for folder, module in named:
        place = ROOT / "src/intaglio" / folder / module
        assert place.is_dir() or place.with_suffix(".py").is_file(), place


def test_no_source_is_ignored():
    """A pattern of .gitignore that meets the package or its tests would keep new files out of commits and wheels."""
    sources = [str(path.relative_to(ROOT)) for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py")]
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    found = subprocess.run(command, cwd=ROOT, input="\n".join(sources), capture_output=True, text=True)
    assert found.stdout == ""
    assert found.returncode == 1  # none


def test_no_machine_paths_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert listed
    for name in listed:
        assert (ROOT / name).stat().st_size < 1_000_000
