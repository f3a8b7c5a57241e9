"""An engine is a row: added, the command knows it; and nothing else asks what an engine is called."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import intaglio
from intaglio.doctor.engines import ENGINES
from support.doctor import foreign

ROW = """
        Engine(
            "tgi",
            facts="made up",
            dialect=Dialect(lambda start: ["tgi-launcher", "--model-id", start.base, "--rank", str(start.rank), *start.named]),
            max_rank=8,
        ),
"""


ASKING = """
import sys
from typer.testing import CliRunner
from intaglio.cli import app

def doctor(*arguments):
    done = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})
    print(done.exit_code, done.output, sep="\\n", end="\\0")

fits, wide = sys.argv[1:]
doctor("--help")
doctor(fits, "--json")
doctor(fits, "--engine", "tgi")
doctor(wide, "--engine", "tgi")
doctor(fits, "--engine", "tgl")
doctor(fits, "--engine", "tgi", "--command", "x")
"""


def test_an_engine_is_one_row(base, shelf, tmp_path):
    """In a copy of the package with one row more, and nothing else, the command knows the engine."""
    copy = tmp_path / "intaglio"
    shutil.copytree(Path(intaglio.__file__).parent, copy)
    table = copy / "doctor/engines.py"
    before, end = table.read_text().rsplit("    )\n}", 1)
    table.write_text(f"{before}{ROW}    )\n}}{end}")
    done = subprocess.run(
        [sys.executable, "-c", ASKING, str(shelf / "plain"), str(foreign(tmp_path / "wide", r=9, lora_alpha=9))],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [answer.split("\n", 1) for answer in done.stdout.split("\0")[:-1]]
    codes, (help_, listed, served, refused, wrong, unread) = zip(*answers, strict=True)
    assert codes == ("0", "0", "0", "1", "2", "2")
    assert "one of vllm, sglang, llama.cpp, lorax, tgi" in help_
    assert list(json.loads(listed)["engines"]) == [*ENGINES, "tgi"]
    assert f"tgi-launcher --model-id {base[0]} --rank 8 plain={shelf / 'plain'}\n" in served
    assert "rank 9 is above 8, the most that tgi takes" in refused
    assert "give one of vllm, sglang, llama.cpp, lorax, tgi" in wrong
    assert "the command line of tgi is not read; give it with --engine vllm or sglang" in unread


def test_nothing_asks_what_an_engine_is_called():
    """What is known of an engine is in its row: no comparison with a name of one."""
    package = Path(intaglio.__file__).parent
    files = [path for folder in ("doctor", "serve", "cli") for path in (package / folder).glob("*.py")]
    compared = [(path, node) for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
    for path, node in compared:
        operands = [node.left, *node.comparators]
        operands += [element for side in operands if isinstance(side, (ast.Tuple, ast.List, ast.Set)) for element in side.elts]
        names = [part.value for part in operands if isinstance(part, ast.Constant) and part.value in ENGINES]
        assert not names, f"{path.name}:{node.lineno}"
