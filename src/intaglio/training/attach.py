"""The door: a method attached to a model. This file names no method, and the regimes in one table."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapter.rest import Rest
from ..core.entries import Whole
from ..core.fingerprint import is_attached
from ..core.probe import Probe
from ..core.selection import Selection
from ..method_kinds.method import NOTHING, Method, refuse_foreign
from ..model import peft_layers
from ..model.wrappers import refuse_parallel, unwrapped
from .fixed_choice import FixedChoice
from .regime import Regime, Wish
from .rotation import Rotation
from .tuner import Tuner
from .unmasking import Unmasking
from .updates import Updates

__all__ = ["REGIMES", "attach"]

REGIMES: dict[str, type[Regime[Any]]] = {regime.name: regime for regime in (FixedChoice, Unmasking, Rotation)}


def attach(
    model: nn.Module,
    method: Method,
    *,
    probe: Probe | None = None,
    exclude: Selection | None = None,
    base: str | None = None,
    partial: bool = True,
    permute: bool = False,
    selection: Selection | None = None,
    updates: Updates | None = None,
) -> Tuner:
    """Freeze `model`, let `method` choose what may change, and make just that trainable, in place.

    The model stays what it was: it trains, generates and saves as before, and its weights are always the tuned ones.

    Args:
        model: any `nn.Module`; methods that choose structures need a transformer. Of a compiled one, what is inside.
        method: what to select, e.g. `S2FT(down=0.02)`.
        probe: data for methods that look at data.
        exclude: entries that must stay frozen, e.g. another adapter's selection.
        base: name of the base model for the adapter; default `model.config._name_or_path`, without local paths.
        partial: use the partial product where it is exact; False takes the dense gradient everywhere (the reference
            twin: same result, more memory).
        permute: reorder the chosen heads and channels to the front while attached, so that their slices are dense
            (co-permutation). Same result; outputs are checked; undone by `detach` and never visible in a Delta.
        selection: what `method` chose earlier, for a run that goes on; default: ask it.
        updates: for a method that chooses at every update, how gradients add up, are clipped and corrected; default
            `Updates()`.

    Parameters that are frozen (`requires_grad` False) while others are not stay frozen: on a PEFT model, the method
    chooses among the adapter's tensors.

    Returns:
        The tuner that owns the training state.

    Raises:
        ValueError: where the model is attached already, or the method does not fit it; the model is then unchanged.

    Example:
        >>> tuner = attach(model, S2FT(o=0.05, down=0.02))
        >>> optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-3)
        >>> loss = model(**batch).loss; loss.backward(); optimizer.step(); optimizer.zero_grad()
        >>> tuner.save("adapter")
    """
    refuse_parallel(model)
    model = unwrapped(model)
    if is_attached(model):
        raise ValueError("this model has a tuner attached already; call its detach() first")
    refuse_foreign(exclude or NOTHING, model)
    left_alone = (exclude or NOTHING).union(_frozen(model))
    rest = Rest.of(model).without(exclude or ())
    wish = Wish(probe=probe, exclude=left_alone, permute=permute, selection=selection, updates=updates)
    regimes = [REGIMES[name](model, applied, wish) for name, applied in method.regimes]
    _refuse_fresh(model, regimes[0].start)
    return Tuner(model, method, regimes, base=base, partial=partial, rest=rest)


def _refuse_fresh(model: nn.Module, start: Selection) -> None:
    """Refuse parameters that no checkpoint had, unless all of them is trained: no adapter would restore them.

    transformers marks what it has loaded. PEFT keeps its own account of what it made.

    Raises:
        ValueError: naming the parameter, and what to do.
    """
    loaded = {name: bool(vars(p).get("_is_hf_initialized")) for name, p in model.named_parameters()}
    if peft_layers.is_peft(model) or not any(loaded.values()):
        return
    fresh = [name for name, there in loaded.items() if not there and not isinstance(start.get(name), Whole)]
    if fresh:
        raise ValueError(
            f"{fresh[0]}: was not in the checkpoint but drawn at random, and this method does not train all of it, so that no "
            "adapter could restore it. Train it whole, e.g. ID3(whole=(…,)) or get_peft_model with S2FTConfig(task_type=…); or "
            "save the model once as it is now (save_pretrained) and load that as the base"
        )


def _frozen(model: nn.Module) -> Selection:
    """The parameters that its user froze; none where all are frozen, as in a model loaded for inference.

    Raises:
        ValueError: for a PEFT model whose adapter is frozen.
    """
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad for p in parameters.values()):
        if peft_layers.is_peft(model):
            raise ValueError("this PEFT model's adapter is frozen: load it with PeftModel.from_pretrained(…, is_trainable=True)")
        return Selection()
    return Selection({name: Whole(tuple(p.shape)) for name, p in parameters.items() if not p.requires_grad})
