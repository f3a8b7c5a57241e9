"""One-line faults planted in the core, each in a copy of the package: does the suite find them? `python tests/planted_faults.py`

Prints a line per fault, and exits with 1 where one goes unnoticed. A fault whose line has changed is an error: plant it anew.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

# file below src/intaglio, the line as it is, the line at fault, tests that must notice
FAULTS = [
    (
        "core/algebra.py",
        "flat = a.flat()[~torch.isin(a.flat(), b.flat())]",
        "flat = a.flat()[torch.isin(a.flat(), b.flat())]",
        "core",
    ),
    (
        "core/budget.py",
        "keep = (score >= threshold).nonzero()",
        "keep = (score > threshold).nonzero()",
        "core training/test_candidates.py",
    ),
    ("core/fingerprint.py", "sha256(header + raw.tobytes())", "sha256(raw.tobytes())", "core adapter peft_tuners/test_guards.py"),
    ("model/projection.py", "units // self.together * self.stride", "units // self.together * self.width", "model"),
    ("method_kinds/unit_method.py", "(-float(scores[key][unit]), unit)", "(float(scores[key][unit]), unit)", "model"),
    (
        "method_kinds/update_method.py",
        "taken, new = exclude.union(kept), NOTHING",
        "taken, new = kept, NOTHING",
        "training methods/test_id3.py",
    ),
    ("methods/s2ft.py", "norm * weights[key].cpu()", "norm / weights[key].cpu()", "model"),
    (
        "training/partial_linear.py",
        "grad_bias = grad_y.flatten(0, -2).sum(0)",
        "grad_bias = grad_y.flatten(0, -2).mean(0)",
        "training",
    ),
    (
        "training/fixed_slot.py",
        "chosen if self.values.grad is None else self.values.grad.add_(chosen)",
        "chosen",
        "training methods/test_contract.py",
    ),
    (
        "training/candidates.py",
        "return (gradient.abs() >= least).nonzero()",
        "return (gradient.abs() > least).nonzero()",
        "training",
    ),
    ("training/growing_slot.py", "gone = (~torch.isin(ever, offset))", "gone = (torch.isin(ever, offset))", "training"),
    ("training/ranks.py", "means = flat.div_(count())", "means = flat", "training/test_replicas.py"),
    ("adapter/rest.py", "found != mark:", "found == mark:", "adapter"),
    ("training/rotation.py", "tensor.activate(True)", "tensor.activate(False)", "training"),
    ("adapter/overlay.py", "self._write(name, Piece(old.place, old.place.base))", "pass", "adapter"),
    ("adapter/delta.py", "differs = tuned != base", "differs = tuned == base", "adapter"),
]


def found(file: str, line: str, fault: str, tests: str) -> bool:
    """Whether these tests fail with this fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
        path = copy / "src/intaglio" / file
        text = path.read_text(encoding="utf-8")
        if text.count(line) < 1:
            raise SystemExit(f"{file}: has no line {line!r} any more")
        path.write_text(text.replace(line, fault, 1), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(copy / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        places = [str(ROOT / "tests" / test) for test in tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *places]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{file}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 1


if __name__ == "__main__":
    missed = 0
    for file, line, fault, tests in FAULTS:
        noticed = found(file, line, fault, tests)
        missed += not noticed
        print(f"{'found' if noticed else 'MISSED'}: {file}: {line} → {fault}", flush=True)
    print(f"{len(FAULTS) - missed} of {len(FAULTS)} found")
    sys.exit(1 if missed else 0)
