"""A LoRA of scattered entries, by PEFT's own singular value decomposition: not exact, and therefore measured."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..adapter.delta import Delta
from ..adapter.folder import WEIGHTS
from ..adapter.names import PREFIX, lora_key
from ..method_kinds.fields import refuse
from ..model.structure import is_transposed
from .figures import size, vllm
from .forms import Options
from .lora import RANKS
from .peft_folder import address, linear_owners, load_stock, target_modules, write_card, write_marker
from .proof import InexactExport
from .staging import staged

__all__ = ["LIMIT", "REPORT", "check_rank", "lines", "prepare", "to_approximate_lora"]

REPORT = "approximation.json"
LIMIT = 0.01  # of the adapter's own effect; see the docstring
_TOKENS, _CHUNK = 512, 128  # tokens of a text that are read, and whose logits are compared at a time
_NO_EFFECT = 1e-7  # nats per token, where fp32 rounding is all that is left


def to_approximate_lora(
    delta: Delta,
    model: Any,
    directory: str | os.PathLike[str],
    *,
    rank: int,
    texts: Sequence[str],
    tokenizer: Any,
    max_loss: float = LIMIT,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a stock PEFT LoRA folder that comes close to the tuned model, and say how close.

    PEFT's `convert_to_lora` takes the largest singular values of each module's D = tuned − base. The folder is loaded with
    PEFT onto the base, and both are compared with the tuned model, in fp32, on texts of the kind the adapter is used for:

        loss = KL(tuned ‖ LoRA) / KL(tuned ‖ base), each the mean over all tokens

    Singular values say little of it: half of ‖D‖ may be lost and a thousandth of what the adapter does. A loss of 0.01, the
    default limit, is a change of the output distribution a hundred times smaller than the adapter's own; rounding a tuned model
    to bfloat16 costs more (2.7 % of a short ID3 run on SmolLM2-135M).

    Args:
        delta: of weights of linear layers: slices, scattered entries or whole.
        model: the base, in the type the delta was trained on; unchanged afterwards.
        directory: the new folder.
        rank: of every module, 1 … 512.
        texts: at least one; of each the first 512 tokens are read.
        tokenizer: the base's.
        max_loss: the greatest loss that is accepted; default 0.01.
        overwrite: replace an earlier export; default False.

    Returns:
        path, rank, max_lora_rank (vLLM's), modules, targets, bytes, compact_bytes, frobenius (‖D − BA‖ / ‖D‖), kl and
        kl_of_adapter (nats per token), loss, same_token (share of tokens with the same best next token), text_tokens. The
        same, with ‖D − BA‖ / ‖D‖ of every module, is written to `approximation.json` beside.

    Raises:
        ValueError: for a delta that holds anything but weights of linear layers; for a rank out of range; where the texts
            hold no two tokens or the adapter does nothing on them; where more is lost than `max_loss`.

    Example:
        >>> to_approximate_lora(delta, base, "lora", rank=16, texts=texts, tokenizer=tokenizer)["loss"] < 0.01
        True

    Source: PEFT's `convert_to_lora`.
    """
    owners = linear_owners(delta, model, "LoRA")
    check_rank(delta, rank)
    rows = _tokens(texts, tokenizer)
    sparse, config, tensors = _convert(delta, model, rank)
    targets = target_modules({path for path, _ in owners.values()}, model)
    address(config, delta, model, targets)
    config.fan_in_fan_out, config.exclude_modules = any(is_transposed(module) for _, module in owners.values()), None
    errors = _errors(sparse, tensors)
    with staged(directory, overwrite=overwrite) as folder:
        safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(folder))
        measured = _measure(sparse.merge_and_unload().float(), load_stock(copy.deepcopy(model).float(), folder), rows)
        report = {"rank": rank, "frobenius": errors.pop(""), "max_loss": max_loss, **measured}
        _refuse_loss(report)
        (folder / REPORT).write_text(json.dumps({**report, "modules": errors}, indent=1) + "\n", encoding="utf-8")
        write_card(folder, delta, "lora", "by singular values, which is not exact; what it loses is in `approximation.json`")
        served = next(known for known in RANKS if known >= rank)
        figures = {"to": "approximate-lora", "max_lora_rank": served, "modules": len(owners), "targets": targets}
        return write_marker(folder, directory, delta, {**figures, **report})


def prepare(delta: Delta, options: Options) -> dict[str, Any]:
    """The arguments of `to_approximate_lora`; refuses missing options, a rank that cannot be, and a file without text."""
    problems, limit = [], LIMIT if options.max_loss is None else options.max_loss
    if options.rank is None or options.text is None:
        problems.append(
            "give --rank, and --text with a file of the kind of text the adapter is for, a text per line: what is lost is "
            "measured on it"
        )
    if not limit > 0:
        problems.append(f"max_loss={limit}: give a share above 0 of what the adapter does, e.g. {LIMIT}")
    refuse("--to approximate-lora", problems)
    assert options.rank is not None  # refused above
    assert options.text is not None
    check_rank(delta, options.rank)
    return {"rank": options.rank, "texts": _lines_of(options.text), "max_loss": limit}


def lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the command shows of the figures."""
    yield "LoRA", f"rank {figures['rank']} in {figures['modules']} modules"
    yield from size(figures)
    yield "NOT EXACT", f"{figures['loss']:.3%} of what the adapter does is lost (allowed: {figures['max_loss']:.1%})"
    kl = f"KL {figures['kl']:.1e} of {figures['kl_of_adapter']:.1e} nats per token, over {figures['text_tokens']:,} tokens"
    yield "measured", f"{kl}; the same best token at {figures['same_token']:.1%}"
    yield "singular values", f"{figures['frobenius']:.1%} of ‖tuned − base‖ is lost; by module in {REPORT}"
    yield from vllm(figures)


def check_rank(delta: Delta, rank: int) -> None:
    """Refuse a rank that some module, or vLLM, cannot have.

    Raises:
        ValueError: naming the rank and the module.
    """
    smallest = min(delta.selection, key=lambda name: min(delta.selection[name].shape))
    most = min(RANKS[-1], *delta.selection[smallest].shape)
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank}: give 1 to {most}, the most that {smallest} and vLLM ({RANKS[-1]}) can have")


def _lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text={str(path)!r}: cannot be read as UTF-8 text ({error})") from error
    if not any(lines):
        raise ValueError(f"text={str(path)!r}: holds no text; give a text per line")
    return [line for line in lines if line]


def _tokens(texts: Sequence[str], tokenizer: Any) -> list[Tensor]:
    """Texts as int64 `[1, tokens]`."""
    if tokenizer is None:
        raise ValueError("the base has no tokenizer, without which nothing can be measured on text; use --to merged")
    rows = [torch.tensor([tokenizer(text, truncation=True, max_length=_TOKENS)["input_ids"]]) for text in texts]
    rows = [row.long() for row in rows if row.numel() > 1]
    if not rows:
        raise ValueError("text: holds no line of at least two tokens; give text of the kind the adapter is for")
    return rows


def _convert(delta: Delta, model: Any, rank: int) -> tuple[Any, Any, dict[str, Tensor]]:
    """(a copy of the base with the delta on it as a PEFT model, LoraConfig, tensors)."""
    from peft import convert_to_lora

    from ..peft_tuners import register

    register()
    with tempfile.TemporaryDirectory() as temporary:
        delta.save(temporary)
        sparse = load_stock(copy.deepcopy(model), Path(temporary))
    sparse.peft_config["default"].target_modules = set()  # PEFT adds every module's name to it
    config, tensors = convert_to_lora(sparse, rank)
    return sparse, config, tensors


def _errors(sparse: Any, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Module path → ‖D − BA‖ / ‖D‖; the whole under the empty path."""
    from ..peft_tuners.delta_layer import DeltaLayer

    squares = {}
    for path, layer in sparse.named_modules():
        if isinstance(layer, DeltaLayer):
            path = path.removeprefix(PREFIX)
            change = layer.get_delta_weight("default").double().cpu()
            product = (tensors[lora_key(path, "B")] @ tensors[lora_key(path, "A")]).double().cpu()
            product = product.T if is_transposed(layer.base_layer) else product
            squares[path] = (change - product).square().sum().item(), change.square().sum().item()
    squares[""] = tuple(map(sum, zip(*squares.values(), strict=True)))
    return {path: (lost / own) ** 0.5 if own else 0.0 for path, (lost, own) in squares.items()}


@torch.no_grad()
def _measure(tuned: Any, lora: Any, rows: list[Tensor]) -> dict[str, Any]:
    """KL of the LoRA's and of the base's next-token distributions from the tuned model's."""
    tuned.eval()
    kl = kl_base = 0.0
    same = count = 0
    for row in rows:
        row = row.to(tuned.device)
        expected, found = tuned(input_ids=row).logits[0], lora(input_ids=row).logits[0]
        with lora.disable_adapter():
            base = lora(input_ids=row).logits[0]
        for p, q, b in zip(*(logits.split(_CHUNK) for logits in (expected, found, base)), strict=True):
            log_p = p.double().log_softmax(-1)
            kl += _kl(log_p, q)
            kl_base += _kl(log_p, b)
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(expected)
    figures = {"kl": kl / count, "kl_of_adapter": kl_base / count, "loss": kl / kl_base if kl_base else 0.0}
    return figures | {"same_token": same / count, "texts": len(rows), "text_tokens": count}


def _kl(log_p: Tensor, logits: Tensor) -> float:
    return (log_p.exp() * (log_p - logits.double().log_softmax(-1))).sum().item()


def _refuse_loss(report: Mapping[str, Any]) -> None:
    if report["kl_of_adapter"] < _NO_EFFECT:
        raise ValueError(
            f"text: the adapter changes nothing on it (KL {report['kl_of_adapter']:.1e} nats per token), so that no loss can be "
            "measured; give text of the kind it was trained on"
        )
    if not report["loss"] <= report["max_loss"]:
        raise InexactExport(
            f"rank {report['rank']} loses {report['loss']:.2%} of what the adapter does on this text (KL {report['kl']:.2e} of "
            f"{report['kl_of_adapter']:.2e} nats per token; {report['frobenius']:.1%} of ‖tuned − base‖), more than the "
            f"{report['max_loss']:.2%} allowed: give a higher --rank, or accept it with --max-loss"
        )
