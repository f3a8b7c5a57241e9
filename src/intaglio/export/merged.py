"""An ordinary model folder with an adapter's tuned values in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..adapter.delta import Delta
from .peft_folder import write_marker
from .proof import InexactExport, answer, applied, prompts
from .staging import staged

__all__ = ["to_merged"]


def to_merged(
    delta: Delta,
    model: Any,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a plain Hugging Face folder: transformers loads it without us, with identical logits and no extra keys.

    The delta is applied to `model`, the folder is written, and the base's values are put back bit for bit. Then the
    folder is loaded with transformers alone and compared before it is renamed into place.

    Args:
        delta: of any kind.
        model: the base, in the type the delta was trained on; unchanged afterwards.
        directory: the new folder.
        tokenizer: written beside the model, if there is one; default None.
        overwrite: replace an earlier export; default False.

    Returns:
        path, parameters (keys of the state dict), bytes, compact_bytes, max_difference (0.0), tokens.

    Raises:
        ValueError: for another base, where `directory` exists, or where the reloaded model is not identical.

    Example:
        >>> to_merged(Delta.load("adapter"), base, "merged")["max_difference"]
        0.0
    """
    with staged(directory, overwrite=overwrite) as folder:
        training = model.training
        model.eval()
        try:
            with applied(delta, model):
                reference = answer(model, prompts(model, tokenizer))
                model.save_pretrained(str(folder))
        finally:
            model.train(training)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        reloaded = _reload(model, folder)
        again = answer(reloaded, reference.prompt)
        if not torch.equal(again.logits, reference.logits):
            difference = (again.logits - reference.logits).abs().max().item()
            raise InexactExport(
                f"the reloaded model is not identical: a logit differs by {difference:.1e}. Was the base cast after loading? "
                "That casts buffers which no folder keeps; load it with dtype=… instead"
            )
        tokens = len(reference.inputs.given) * reference.generated
        figures = {"to": "merged", "parameters": len(reloaded.state_dict()), "max_difference": 0.0, "tokens": tokens}
        return write_marker(folder, directory, delta, figures)


def _reload(model: Any, folder: Path) -> Any:
    """The folder's model, with the same keys as the base."""
    # What computes attention and experts is not in the folder, and decides the last bits.
    parts = {part: getattr(model.config, f"_{part}_implementation", None) for part in ("attn", "experts")}
    known = {f"{part}_implementation": value for part, value in parts.items() if value is not None}
    reloaded, info = type(model).from_pretrained(str(folder), output_loading_info=True, **known)
    extra = sorted({*info["missing_keys"], *info["unexpected_keys"]} | (reloaded.state_dict().keys() ^ model.state_dict().keys()))
    if extra:
        raise InexactExport(f"the reloaded model has other keys than the base: {', '.join(extra[:3])}")
    return reloaded.to(model.device).eval()
