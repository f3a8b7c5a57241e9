"""Which layers train now: draws, probes and what follows from them, applied to a model.

One engine for slots and for the bare tensors of a PEFT model: it sees `Part`s. All are trainable when it is made, so that
whoever counts, wraps (DDP) or optimizes parameters finds every one; from the first training forward on, those of idle
layers get no gradient, and nothing is kept for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.probe import Probe, batch_on, chunks, has_own_loss
from ..core.scores import stable_seed
from ..method_kinds.layer_method import LayerMethod
from ..model import peft_layers as adapters
from ..model.calibration import quiet
from ..model.layers import stacks
from .damping import Part
from .resting import Resting

__all__ = ["Rotation", "keep_starts"]

_DTYPE = torch.float64


@final
class Rotation:
    """Draws the layers that train, and learns their importance.

    Args:
        model: the model; it gets forward hooks until `release`.
        method: what draws and learns.
        parts: name of each trained parameter → what is trained of it.
        probe: data that importance is learned from, one batch for each probe, in turn.

    Attributes:
        layers: which parameters belong to which layer.
        importance: per layer, fp64 `[L]`, on the CPU; higher is more important.
        active: numbers of the layers that train now, ascending.
        visits: updates in which each layer was trained.
        probes: probes made.
        skipped: probes of which a loss was not finite, so that nothing was learned.
        seconds: time spent on probes, in this process.
        history: "draws": (update, layers) of each draw, update 0 being the start; "probes": (update, importance after it,
            damped sets, their losses).

    Raises:
        ValueError: where the model has no layers, fewer than asked, a prompt for an adapter, weights that are spread over
            processes, layers that take turns already, or a probe is needed and there is none.
    """

    def __init__(self, model: nn.Module, method: LayerMethod, parts: Mapping[str, Part], probe: Probe | None = None) -> None:
        kind = type(method).__name__
        adapters.refuse_prompts(model, kind)
        adapters.refuse_sharded(model, f"{kind} lets layers rest by themselves")
        if any(isinstance(getattr(hook, "__self__", None), Rotation) for hook in model._forward_pre_hooks.values()):
            raise ValueError(
                f"{kind}: the layers of this model take turns already; give one method only, and after a run that broke off "
                "call release() of its rotation first, or load the model anew"
            )
        if method.learns and probe is None:
            raise ValueError(f"{kind}: learns from data: give a probe, e.g. probe=Batches([batch, ...]), or use RST")
        self.layers = stacks(model, parts)
        method.check(len(self.layers))
        self.model, self.method, self._parts, self._probe = model, method, dict(parts), probe
        self._loss = None if probe is None else probe.loss
        self.importance = torch.zeros(len(self.layers), dtype=_DTYPE)
        self.visits, self._ages = [0] * len(self.layers), [0] * len(self.layers)
        self.probes = self.skipped = self._position = 0
        self.seconds = 0.0
        self.history: dict[str, list[Any]] = {"draws": [], "probes": []}
        self._generators = {key: torch.Generator().manual_seed(stable_seed(method.seed, key)) for key in ("draws", "sets")}
        self._batches: Any = None
        self._damping = _damping(model, self.layers.groups, self._parts, method.learns)
        self._resting = Resting(model, self.layers.paths, idle_dropout=method.idle_dropout)
        self._applied = self._watched = False
        self.active: list[int] = []
        self._draw(0)
        self._handle = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """See to it that idle layers rest before the first of the optimizer's steps, whatever came before it."""
        self._watched = True
        optimizer.register_step_pre_hook(lambda *_: self.apply())

    def measure_by(self, loss: Callable[[nn.Module, Mapping[str, Any]], Tensor]) -> None:
        """Take a trainer's loss of the probe's batches, which it trains on, unless the probe was given one."""
        if self._probe is not None and not has_own_loss(self._probe):
            self._loss = loss

    def apply(self) -> None:
        """Let the drawn layers train, and no others; done by the first training forward after a draw."""
        if self._applied:
            return
        active = set(self.active)
        for number, group in enumerate(self.layers.groups):
            for name in group:
                self._parts[name].activate(number in active)
        self._resting.rest([number for number in range(len(self.layers)) if number not in active])
        self._applied = True

    def advance(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Go on after update number `step`, from 1: probe where that is due, then draw where that is due.

        Args:
            step: updates made.
            optimizer: whose state of idle layers is kept, dropped or offloaded.

        Raises:
            ValueError: where the probe gives no batch or no loss.
        """
        for number in self.active:
            self.visits[number] += 1
        if self._probe is not None and self.method.learns and self.method.probes_at(step):
            self._learn(step, self._probe)
        if self.method.draws_at(step):
            self._draw(step)
            self.apply()
        if optimizer is not None and self.method.state != "keep":
            self._move_state(optimizer)

    def release(self) -> None:
        """Take the hooks off, and let every layer train again."""
        self._handle.remove()
        self._resting.release()
        for part in self._parts.values():
            part.activate(True)

    def losses(self, sets: list[list[int]], batch: Mapping[str, Any]) -> list[float]:
        """The probe's loss of a batch with each set of layers damped; the model is left as it was, to the bit."""
        assert self._loss is not None
        device = next(self.model.parameters()).device
        # As many pieces in every process: a trainer's loss may gather over them.
        largest = _greatest(self._resting.largest, device)
        pieces = list(chunks(self.model, batch_on(batch, device), largest))
        found = []
        with quiet(self.model), torch.no_grad(), self._resting.autocast():
            for places in sets:
                with self._damped(places):
                    found.append(math.fsum(float(self._loss(self.model, piece)) * share for piece, share in pieces))
        return found

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        generators = {key: bytes(g.get_state().tolist()).hex() for key, g in self._generators.items()}
        return {
            "layers": list(self.layers.paths),
            "importance": self.importance.tolist(),
            "active": list(self.active),
            "ages": list(self._ages),
            "visits": list(self.visits),
            "counts": [self.probes, self.skipped, self._position, self._resting.largest],
            "generators": generators,
            "history": {key: list(rows) for key, rows in self.history.items()},
        }

    def check(self, method: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Refuse a state of another method or of other layers; what is trained in a layer is left to others to compare.

        Args:
            method: of the run that was saved, as `Method.to_dict` gives it.
            state: its `state()`.

        Raises:
            ValueError: naming what differs.
        """
        own = self.method.to_dict()
        differ = [key for key in own if key != "of" and method.get(key) != own[key]]
        if differ:
            raise ValueError(
                f"resume: the checkpoint's {differ[0]} is {method.get(differ[0])!r}, this run's {own[differ[0]]!r}; change it "
                "back, or start anew"
            )
        if state is None:
            raise ValueError("resume: the checkpoint says nothing about layers; it was made without this method")
        if state["layers"] != list(self.layers.paths):
            raise ValueError(
                f"resume: the checkpoint has {len(state['layers'])} layers, {', '.join(state['layers'][:2])} …; this model "
                f"{len(self.layers)}, {', '.join(self.layers.paths[:2])} …"
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`, which `check` has passed."""
        self.importance = torch.tensor(state["importance"], dtype=_DTYPE)
        self.active, self._ages, self.visits = list(state["active"]), list(state["ages"]), list(state["visits"])
        self.probes, self.skipped, self._position, self._resting.largest = state["counts"]
        for key, generator in self._generators.items():
            generator.set_state(torch.tensor(list(bytes.fromhex(state["generators"][key])), dtype=torch.uint8))
        self.history = {key: list(rows) for key, rows in state["history"].items()}
        self._batches, self._applied = None, False

    def _draw(self, step: int) -> None:
        active = self.method.active(self.importance, self._generators["draws"], self._ages)
        (self.active,) = _agreed([active], len(self.layers), next(self.model.parameters()).device)
        assert len(self.active) == self.method.active_count(len(self.layers))
        self._ages = [0 if number in self.active else age + 1 for number, age in enumerate(self._ages)]
        self.history["draws"].append([step, list(self.active)])
        self._applied = False

    def _learn(self, step: int, probe: Probe) -> None:
        start = time.perf_counter()
        device = next(self.model.parameters()).device
        sets = _agreed(self.method.suppressed_sets(self.importance, self._generators["sets"]), len(self.layers), device)
        if sets:
            losses = _averaged(self.losses(sets, self._next_batch(probe)), device)
            self.probes += 1
            self.skipped += not all(map(math.isfinite, losses))
            self.importance = self.method.learn(self.importance, sets, losses)
            # JSON knows no infinity: a loss that is not finite is None.
            shown = [loss if math.isfinite(loss) else None for loss in losses]
            self.history["probes"].append([step, self.importance.tolist(), sets, shown])
        self.seconds += time.perf_counter() - start

    def _next_batch(self, probe: Probe) -> Mapping[str, Any]:
        if self._batches is None:  # at first, or resumed: go to where the run stood
            self._batches = islice(probe.batches(), self._position, None)
        batch = next(self._batches, None)
        if batch is None:
            self._batches, self._position = iter(probe.batches()), 0
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError("probe: it has no batches to learn importance from; give it data")
        self._position += 1
        return batch

    def _damped(self, places: list[int]) -> ExitStack:
        stack = ExitStack()
        factor = self.method.damping
        with stack:
            for number in places:
                modules, weights = self._damping[number]
                stack.enter_context(adapters.damped(modules, factor))
                for part in weights:
                    stack.callback(part.damp(factor))
            return stack.pop_all()

    def _move_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop or offload the optimizer's state of idle layers, and bring back that of active ones."""
        for number, group in enumerate(self.layers.groups):
            for name in group:
                parameter = self._parts[name].parameter
                if number not in self.active and self.method.state == "drop":
                    optimizer.state.pop(parameter, None)
                elif parameter in optimizer.state:
                    place = parameter.device if number in self.active else torch.device("cpu")
                    held = optimizer.state[parameter]
                    held |= {k: v.to(place) for k, v in held.items() if isinstance(v, Tensor) and v.dim() > 0}

    def _before_forward(self, model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled() and (model.training or self._watched):
            self.apply()
            self._resting.look(inputs, kwargs)


def keep_starts(model: nn.Module, parts: Mapping[str, Part]) -> bool:
    """Remember where weights start that damping leads back to: those of layers that are in no adapter.

    For who loads a checkpoint between this and `Rotation`, with the same parts. Returns whether there are any.
    """
    return any(weights for _, weights in _damping(model, stacks(model, parts).groups, parts, True))


_Damped = tuple[list[tuple[nn.Module, set[str]]], list[Part]]


def _damping(model: nn.Module, groups: tuple[tuple[str, ...], ...], parts: Mapping[str, Part], probed: bool) -> list[_Damped]:
    """Per layer: PEFT layers whose response is damped, and parts of weights that are, which remember where they start."""
    named, plans = dict(model.named_parameters()), []
    for group in groups:
        found = adapters.adapters_of(model, [named[name] for name in group]) if probed else {}
        in_adapters = {held for module, _ in found.values() for held in adapters.held_by(module)}
        weights = [parts[name] for name in group if probed and id(named[name]) not in in_adapters]
        for part in weights:
            part.keep_start()
        plans.append((list(found.values()), weights))
    return plans


def _distributed() -> bool:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def _agreed(sets: list[list[int]], total: int, device: torch.device) -> list[list[int]]:
    """The first process's sets of layers, on every process."""
    if not _distributed() or not sets:
        return sets
    rows = torch.zeros(len(sets), total, dtype=torch.uint8)
    for row, places in zip(rows, sets, strict=True):
        row[places] = 1
    rows = rows.to(device)
    torch.distributed.broadcast(rows, 0)
    return [row.nonzero().flatten().tolist() for row in rows.cpu()]


def _greatest(number: int, device: torch.device) -> int:
    """The greatest of the processes' numbers."""
    if not _distributed():
        return number
    shared = torch.tensor(number, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)


def _averaged(losses: list[float], device: torch.device) -> list[float]:
    """Mean over the processes."""
    if not _distributed():
        return losses
    total = torch.tensor(losses, dtype=_DTYPE, device=device)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).tolist()
