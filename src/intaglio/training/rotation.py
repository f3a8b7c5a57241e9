"""A rotation: which layers train now, by draws and by what probes teach about the layers.

One engine for slots and for the bare tensors of a PEFT model. All are trainable when it is connected, so that whoever counts,
wraps (DDP) or optimizes parameters finds every one; from the first training forward on, those of idle layers get no
gradient, and nothing is kept for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.probe import Probe, batch_on, chunks, has_own_loss
from ..core.scores import stable_seed
from ..method_kinds.layer_method import LayerMethod
from ..model import peft_layers
from ..model.calibration import quiet
from ..model.layers import stacks
from . import ranks
from .damping import Damping, Trained
from .regime import Loss, Recorder, Regime, Wish, refuse_differing
from .resting import Resting
from .rotation_record import RotationRecord
from .slots import Slots

__all__ = ["Rotation"]


@final
class Rotation(Regime[LayerMethod]):
    """Draws the layers that train, and learns their importance.

    Args:
        model: the model; it gets forward hooks from `connect` until `release`.
        method: what draws and learns, a `LayerMethod`.
        wish: its probe is the data that importance is learned from, one batch for each probe, in turn.

    Attributes:
        layers: which trained tensors belong to which layer, once connected.
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

    name = "rotation"
    leaves_unused = True

    def __init__(self, model: nn.Module, method: LayerMethod, wish: Wish) -> None:
        self.method, kind = method, type(method).__name__
        peft_layers.refuse_prompts(model, kind)
        peft_layers.refuse_sharded(model, f"{kind} lets layers rest by themselves")
        if any(isinstance(getattr(hook, "__self__", None), Rotation) for hook in model._forward_pre_hooks.values()):
            raise ValueError(
                f"{kind}: the layers of this model take turns already; give one method only, and after a run that broke off "
                "call release() of its rotation first, or load the model anew"
            )
        if method.learns and wish.probe is None:
            raise ValueError(f"{kind}: learns from data: give a probe, e.g. probe=Batches([batch, ...]), or use RST")
        self.model, self._probe = model, wish.probe
        self._loss: Loss | None = None if wish.probe is None else wish.probe.loss
        self.probes = self.skipped = self._position = 0
        self.seconds = 0.0
        self.active: list[int] = []
        self.history: dict[str, list[Any]] = {"draws": [], "probes": []}
        self._generators = {key: torch.Generator().manual_seed(stable_seed(self.method.seed, key)) for key in ("draws", "sets")}
        self._batches: Any = None
        self._applied = self._watched = False
        self._trained: dict[str, Trained] = {}
        self._undo = ExitStack()

    def connect(self, slots: Slots) -> None:
        self.connect_tensors({slot.name: slot for slot in slots})

    def connect_tensors(self, trained: Mapping[str, Trained]) -> None:
        """Let these tensors train in turn, by the layers that they are in: name → tensor."""
        model, self.layers = self.model, stacks(self.model, trained)
        self.method.check(len(self.layers))
        self._trained = dict(trained)
        self.importance = torch.zeros(len(self.layers), dtype=torch.float64)
        self.visits, self._ages = [0] * len(self.layers), [0] * len(self.layers)
        self._damping = Damping(model, self.layers.groups, trained) if self.method.learns else None
        self._resting = Resting(model, self.layers.paths, idle_dropout=self.method.idle_dropout)
        self._undo.callback(self._resting.release)
        self._draw(0)
        self._undo.callback(model.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        self._watched = True
        optimizer.register_step_pre_hook(lambda *_: self.apply())  # idle layers rest, whatever came before the first step

    def measure_by(self, loss: Loss) -> None:
        if self._probe is not None and not has_own_loss(self._probe):
            self._loss = loss

    def apply(self) -> None:
        """Let the drawn layers train, and no others; done by the first training forward after a draw."""
        if self._applied:
            return
        active = set(self.active)
        for number, group in enumerate(self.layers.groups):
            for name in group:
                self._trained[name].activate(number in active)
        self._resting.rest([number for number in range(len(self.layers)) if number not in active])
        self._applied = True

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
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
        if self.method.state != "keep":
            self._move_state(optimizer)

    def release(self) -> None:
        """Take the hooks off, and let every layer train again."""
        self._undo.close()
        for tensor in self._trained.values():
            tensor.activate(True)

    def losses(self, sets: list[list[int]], batch: Mapping[str, Any]) -> list[float]:
        """The probe's loss of a batch with each set of layers damped; the model is left as it was, to the bit."""
        assert self._loss is not None and self._damping is not None  # noqa: PT018
        device = next(self.model.parameters()).device
        # As many pieces in every process: a trainer's loss may gather over them.
        largest = ranks.greatest(self._resting.largest)
        pieces = list(chunks(self.model, batch_on(batch, device), largest))
        found = []
        with quiet(self.model), torch.no_grad(), self._resting.autocast():
            for places in sets:
                with self._damping.damped(places, self.method.damping):
                    found.append(math.fsum(float(self._loss(self.model, piece)) * share for piece, share in pieces))
        return found

    def log(self) -> dict[str, float]:
        return {"probe_seconds": round(self.seconds, 2)} if self.method.learns else {}

    def recorder(self) -> Recorder:
        return RotationRecord(self)

    def state(self) -> dict[str, Any]:
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
        refuse_differing({**method, "of": None}, {**self.method.to_dict(), "of": None})
        if state is None:
            raise ValueError("resume: the checkpoint says nothing about layers; it was made without this method")
        if state["layers"] != list(self.layers.paths):
            raise ValueError(
                f"resume: the checkpoint has {len(state['layers'])} layers, {', '.join(state['layers'][:2])} …; this model "
                f"{len(self.layers)}, {', '.join(self.layers.paths[:2])} …"
            )

    def load(self, step: int, method: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        assert state is not None
        self.importance = torch.tensor(state["importance"], dtype=torch.float64)
        self.active, self._ages, self.visits = list(state["active"]), list(state["ages"]), list(state["visits"])
        self.probes, self.skipped, self._position, self._resting.largest = state["counts"]
        for key, generator in self._generators.items():
            generator.set_state(torch.tensor(list(bytes.fromhex(state["generators"][key])), dtype=torch.uint8))
        self.history = {key: list(rows) for key, rows in state["history"].items()}
        self._batches, self._applied = None, False

    def _draw(self, step: int) -> None:
        active = self.method.active(self.importance, self._generators["draws"], self._ages)
        (self.active,) = ranks.same_sets([active])
        assert len(self.active) == self.method.active_count(len(self.layers))
        self._ages = [0 if number in self.active else age + 1 for number, age in enumerate(self._ages)]
        self.history["draws"].append([step, list(self.active)])
        self._applied = False

    def _learn(self, step: int, probe: Probe) -> None:
        start = time.perf_counter()
        device = next(self.model.parameters()).device
        sets = ranks.same_sets(self.method.suppressed_sets(self.importance, self._generators["sets"]))
        if sets:
            losses = ranks.mean_losses(self.losses(sets, self._next_batch(probe)), device)
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

    def _move_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop or offload the optimizer's state of idle layers, and bring back that of active ones."""
        for number, group in enumerate(self.layers.groups):
            for name in group:
                parameter = self._trained[name].values
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
