"""Everything that reads an adapter folder, each with a check that what it makes of the folder is what the folder says.

A reader takes a `Bench` and a folder. It raises what the real one raises, `Wrong` where the result is not that of the plain
reader (`plain_reading`), and gives back whether there was something for it to read.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from intaglio import AdapterPool, Delta
from intaglio.doctor.examine import examine
from intaglio.export.forms import Options
from intaglio.export.from_lora import prepare, read_lora, to_delta
from intaglio.runs.config import load_config
from intaglio.runs.folder import read_run
from intaglio.runs.inspect import inspect
from intaglio.runtime.changes import Change
from intaglio.runtime.store import AdapterStore
from lib import plain_reading


class Wrong(AssertionError):
    """A result that is not what the folder says."""


class Bench:
    """A base that readers are tried on, which must stay as it is.

    Args:
        base: the model.
        place: a folder for what readers write: pictures, exports.
        drawn: whether `inspect` draws its picture, `to_delta` writes: they take a hundred times as long as all the rest.
    """

    def __init__(self, base: nn.Module, place: Path, *, drawn: bool = True) -> None:
        self.base, self.place, self.drawn = base, place, drawn
        self.weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
        self.renew()

    def renew(self) -> None:
        """Begin anew, with the base as it was."""
        with torch.no_grad():
            for name, parameter in self.base.named_parameters():
                parameter.copy_(self.weights[name])
        self.pool, self.store = AdapterPool(self.base), AdapterStore(self.base)

    def check(self, changed: Mapping[str, Tensor], what: str, model: nn.Module | None = None) -> None:
        """Refuse a model, by default the base, whose weights are not the base's with some changed, bit for bit.

        Raises:
            Wrong: naming the parameter.
        """
        expected = {**self.weights, **changed}
        for name, parameter in (model or self.base).named_parameters():
            plain = name.replace(".base_layer", "")  # where PEFT has wrapped its layer
            if plain in expected and not torch.equal(_bits(parameter.detach()), _bits(expected[plain])):
                raise Wrong(f"{what}: {plain} is not as it has to be")


def delta(bench: Bench, folder: Path) -> bool:
    """`Delta.load`, applied and reverted."""
    found = Delta.load(folder)
    found.apply_(bench.base)
    bench.check(plain_reading.tuned(folder, bench.weights), "applied")
    found.revert_(bench.base)
    return True


def pool(bench: Bench, folder: Path) -> bool:
    """`AdapterPool`: loaded, switched to, switched back, unloaded."""
    bench.pool.load("a", folder)
    try:
        bench.pool.use("a")
        bench.check(plain_reading.tuned(folder, bench.weights), "in use")
    finally:
        bench.pool.use(None)
        bench.pool.unload("a")
    return True


def store(bench: Bench, folder: Path) -> bool:
    """`AdapterStore`, the server's: what its changes add to the layers' outputs."""
    kind = bench.store.load("a", folder).kind
    try:
        changes, near = bench.store.fetch("a").changes, 0.0
        if kind == "slices":
            expected = {name: weight - bench.weights[name] for name, weight in plain_reading.tuned(folder, bench.weights).items()}
        else:
            expected, near = plain_reading.lora(folder), torch.finfo(next(bench.base.parameters()).dtype).eps * 4
        if extra := [path for path in changes if f"{path}.weight" not in expected]:
            raise Wrong(f"served: {extra[0]} is changed too")
        for name, change_OI in expected.items():
            found_OI, path = torch.zeros_like(change_OI), name.removesuffix(".weight")
            if path in changes:
                found_OI = _dense(changes[path], bench.weights[name])
            if not bool(((found_OI.double() - change_OI.double()).abs() <= near * change_OI.abs().max().double() + 1e-30).all()):
                raise Wrong(f"served: {name} is not changed as it has to be")
    finally:
        bench.store.unload("a")
    return True


def look(bench: Bench, folder: Path) -> bool:
    """`intaglio inspect`, whose picture is drawn now and then."""
    output = bench.place / "picture"
    if bench.drawn:
        result = inspect(folder, output=output)
        shutil.rmtree(output, ignore_errors=True)
    else:
        with mock.patch("intaglio.report.heatmap.plot_selection", return_value=output):
            result = inspect(folder, output=output)
    json.dumps(result, default=str)
    return True


def run_file(bench: Bench, folder: Path) -> bool:
    """The settings in `run.json`, which `verify`, `evaluate` and `export` begin with."""
    if not (folder / "run.json").exists():
        return False
    load_config(read_run(folder)["config"], build=False)
    return True


def doctor(bench: Bench, folder: Path) -> bool:
    """`intaglio doctor`, for every engine."""
    examine([f"a={folder}"])
    return True


def from_lora(bench: Bench, folder: Path) -> bool:
    """`intaglio export --to delta`: read and prepared; now and then written, and applied as the plain reader says."""
    lora = read_lora(folder)
    prepare(lora, Options())
    if bench.drawn:
        made = bench.place / "made"
        try:
            to_delta(lora, bench.base, made, overwrite=True)
            delta(bench, made)
            near = torch.finfo(next(bench.base.parameters()).dtype).eps * 4
            for name, change_OI in plain_reading.lora(folder).items():
                wanted_OI = bench.weights[name].double() + change_OI
                found_OI = plain_reading.tuned(made, bench.weights).get(name, bench.weights[name]).double()
                if not bool(((found_OI - wanted_OI).abs() <= near * (wanted_OI.abs().max() + change_OI.abs().max())).all()):
                    raise Wrong(f"exported: {name} is not changed as it has to be")
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return True


def peft(bench: Bench, folder: Path) -> bool:
    """`PeftModel.from_pretrained`, merged and unmerged; of folders that say they are of our type, others are PEFT's to read."""
    from peft import PeftModel

    config = folder / "adapter_config.json"
    try:
        if not config.is_file() or json.loads(config.read_text())["peft_type"] != "INTAGLIO":
            return False
    except (ValueError, RecursionError, TypeError, KeyError):
        return False
    base = copy.deepcopy(bench.base)
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except BaseException:
        bench.check({}, "refused", base)
        raise
    tuned, peft_model = plain_reading.tuned(folder, bench.weights), cast(Any, model)
    peft_model.merge_adapter()
    bench.check(tuned, "merged", model.get_base_model())
    peft_model.unmerge_adapter()
    bench.check({}, "unmerged", model.get_base_model())
    return True


READERS: dict[str, Callable[[Bench, Path], bool]] = {
    "Delta.load, apply_, revert_": delta,
    "AdapterPool": pool,
    "AdapterStore": store,
    "inspect": look,
    "run.json": run_file,
    "doctor": doctor,
    "export --to delta": from_lora,
    "PeftModel.from_pretrained": peft,
}


def _bits(tensor: Tensor) -> Tensor:
    """A tensor whose equality is that of bits: NaN is NaN, −0 is not 0."""
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _dense(change: Change, weight_OI: Tensor) -> Tensor:
    """What a change adds to a weight, `[out, in]`."""
    outputs, inputs = weight_OI.shape
    y_IO = torch.zeros(inputs, outputs, dtype=weight_OI.dtype)
    change.apply_(y_IO, torch.eye(inputs, dtype=weight_OI.dtype))
    return y_IO.T
