"""The plain twin of the plugin's `cpu` and `kernels`: one token after the other. Suffixes: T tokens, I inputs, O outputs."""

from __future__ import annotations

from torch import Tensor

from intaglio.vllm_plugin.slots import Pool, Slots

__all__ = ["add", "add_columns", "add_rows"]


def add(y_TO: Tensor, x_TI: Tensor, slots: Slots, slot_T: Tensor) -> None:
    """Add to each token's output the change of its slot's adapter, in place.

    Args:
        y_TO: outputs of the base weight.
        x_TI: its inputs.
        slots: the loaded adapters of this weight.
        slot_T: the slot of each token; −1: none, the output stays as it is.
    """
    add_columns(y_TO, x_TI, slots.columns, slot_T)
    add_rows(y_TO, x_TI, slots.rows, slot_T)


def add_columns(y_TO: Tensor, x_TI: Tensor, pool: Pool, slot_T: Tensor) -> None:
    """y[t] += Σ_j x[t, index_j] · values_j, summed in fp32 and rounded once. Arguments as `add`."""
    for token, slot in enumerate(slot_T.tolist()):
        if slot >= 0 and pool.span(slot)[1]:
            index, values = pool.get(slot)
            y_TO[token] = y_TO[token].float() + x_TI[token, index].float() @ values.float()


def add_rows(y_TO: Tensor, x_TI: Tensor, pool: Pool, slot_T: Tensor) -> None:
    """y[t, index_j] += x[t] · values_j, summed in fp32 and rounded once. Arguments as `add`."""
    for token, slot in enumerate(slot_T.tolist()):
        if slot >= 0 and pool.span(slot)[1]:
            index, values = pool.get(slot)
            y_TO[token, index] = (y_TO[token, index].float() + values.float() @ x_TI[token].float()).to(y_TO.dtype)
