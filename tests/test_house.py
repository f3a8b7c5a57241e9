"""The house stays one that people can live in: sizes of files and functions, nouns first, no branch on what a thing is called."""

import ast
import re
import statistics
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/intaglio"
FILES = {str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
MODULES = {name: text for name, text in FILES.items() if not name.endswith("__init__.py")}


def functions():
    """Name and lines of every function, without its docstring."""
    for name, text in FILES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                said = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                yield f"{name}:{node.name}", node.end_lineno - node.lineno + 1 - said


def test_files_are_of_one_idea():
    lines = {name: len(text.splitlines()) for name, text in MODULES.items()}
    limits = {name: 250 if name.startswith(("core/", "training/", "methods/")) else 300 for name in lines}
    assert {name: length for name, length in lines.items() if length > limits[name]} == {}
    assert statistics.median(lines.values()) <= 130


def test_functions_are_short():
    lengths = dict(functions())
    assert {name: length for name, length in lengths.items() if length > 70} == {}
    assert statistics.median(lengths.values()) <= 6
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 20


@pytest.mark.parametrize(("file", "cls"), [("training/unmasking.py", "Unmasking"), ("training/tuner.py", "Tuner")])
def test_the_two_great_classes_stay_small(file, cls):
    found = next(node for node in ast.walk(ast.parse(FILES[file])) if isinstance(node, ast.ClassDef) and node.name == cls)
    assert found.end_lineno - found.lineno + 1 <= 220


def test_nothing_branches_on_what_a_thing_is_called():
    """A method, a regime, a form or an engine says itself what it does."""
    branch = re.compile(
        r"isinstance\((?:self\._?)?method, (?!dict)|\b(?:method|regime|form|engine)\.name (?:==|!=|in)|\.phase\b|\bto == \""
    )
    found = {name: match[0] for name, text in FILES.items() if (match := branch.search(text))}
    assert found == {}


def test_modules_begin_with_the_thing():
    """A noun, not a question or a relation without one."""
    riddles = ("What ", "How ", "Which ", "Where ", "When ", "Whether ", "Why ", "Say ", "Hand ", "Make ", "Find ")
    first = {name: ast.get_docstring(ast.parse(text)) or "" for name, text in MODULES.items()}
    assert {name: line.splitlines()[0] for name, line in first.items() if line.startswith(riddles)} == {}
    assert [name for name, line in first.items() if not line and name != "__main__.py"] == []
