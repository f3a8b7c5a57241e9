"""Benchmarks: programs answer for help, `lib` alone starts processes, and published tables follow from published figures."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = sorted(ROOT.glob("*.py"))


def python(*arguments, **options):
    """Run Python with the folder of the benchmarks on its path, as their programs have it."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_program_answers_for_help():
    """All in one process, so that libraries are loaded once."""
    code = f"""
import runpy, sys
for program in {[str(program) for program in PROGRAMS]!r}:
    sys.argv = [program, "--help"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        assert not end.code, program
"""
    shown = python("-c", code)
    assert len(PROGRAMS) >= 15
    for program in PROGRAMS:
        doc = ast.get_docstring(ast.parse(program.read_text()))
        assert doc is not None
        assert doc.partition("\n")[0] in shown, program


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_a_program_starts_no_processes_itself(program):
    text = program.read_text()
    started = "processes are started by lib/turns.py, lib/forked.py, lib/server_process.py and lib/gguf_engines.py"
    assert "subprocess" not in text, started
    assert "os.fork" not in text, started
    assert "--child" not in text, "lib/turns.py: parse() has the argument"


TOY = '''
"""A program of two contestants, of which one has no memory for its turns."""
from pathlib import Path
import torch
from lib import cells, command_line
from lib.turns import measure, parse

def start(task):
    def turn():
        if task["contestant"] == "large":
            raise torch.OutOfMemoryError
        print("what libraries print is in nobody's way")
        return {"times": [{"total": 3.0}, {"total": 1.0}, {"total": 2.0}], "length": task["length"]}
    return {"contestant": task["contestant"]}, turn

def cell(task):
    found = measure({"small": "Small", "large": "Large"}, task, arguments.rounds, one_by_one=arguments.one_by_one)
    return {"task": task, "results": found}

parser = cells.parser(__doc__, ["small", "large"])
command_line.add_write(parser, "toy")
arguments = parse(parser, start)
page = cells.Page(lambda: "# Toy\\n\\n", lambda cell: cells.title(cell["task"]) + "\\n", lambda cell, path: path.touch())
cells.run(cells.tasks(arguments, ["steps"]), cell, page, arguments.write)
'''


def test_contestants_take_turns_in_processes_of_their_own(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    options = ("--shape", "tiny", "--length", 7, "--dtype", "bfloat16", "--rounds", 2, "--write", "out/toy")
    shown = python("toy.py", *options, cwd=tmp_path)
    assert shown == "tiny, 4 × 7 tokens, bfloat16\n\n"
    assert (tmp_path / "out/toy.md").read_text() == "# Toy\n\ntiny, 4 × 7 tokens, bfloat16\n"
    assert (tmp_path / "out/toy.png").exists()
    (cell,) = json.loads((tmp_path / "out/toy.json").read_text())["cells"]
    assert cell["task"] == {"shape": "tiny", "length": 7, "batch": 4, "dtype": "bfloat16", "steps": 3}
    seconds = {"seconds": {"total": 2.0}, "least": {"total": 1.0}, "fastest": 1.0, "steps": 6}
    assert cell["results"]["small"] == {"label": "Small", "contestant": "small", "length": 7} | seconds
    assert cell["results"]["large"] == {"label": "Large", "contestant": "large", "oom": True}


def test_published_tables_follow_from_published_figures():
    """A figure's definition does not change unseen: today's code makes every line of the tables that were published."""
    code = """
import json, sys
from pathlib import Path
import parallel, serve_engine, step, vllm_check
from lib import importance_report, layers_report, switch_report, unmask_report
read = lambda name: json.loads(Path(sys.argv[1], f"{name}.json").read_text())
cells = lambda name, program: "".join(program.table(cell) for cell in read(name)["cells"])
switches = [cell for group in read("switch")["cells"].values() for cell in group]
print(json.dumps({
    "step": cells("step", step),
    "layers": cells("layers", layers_report),
    "unmask": cells("unmask", unmask_report),
    "switch": switch_report.reached(switches) + "".join(map(switch_report.table, switches)),
    "parallel": "".join(parallel.table(found, dtype, 16) for dtype, found in read("parallel")["seconds"].items()),
    "importance": importance_report.text(read("importance")),
    "serve-engine": "".join(serve_engine.table(found, size) for size, found in read("serve-engine")["sizes"].items()),
    "vllm-cpu": vllm_check.report(read("vllm-cpu")),
}))
"""
    for name, made in json.loads(python("-c", code, ROOT / "results")).items():
        published = set(_lines((ROOT / f"results/{name}.md").read_text()))
        assert len(made) > 500
        assert [line for line in _lines(made) if line not in published] == [], name


def _lines(text):
    """Lines with text, however a table's rule is drawn."""
    return [re.sub(r"\s+", " ", line) for line in text.splitlines() if re.search(r"\w", line)]
