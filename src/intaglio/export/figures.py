"""Lines for a terminal that several exports have in common: their size, how exact they are, how vLLM is started with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["exact", "exactness", "size", "vllm"]


def exact(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of any export that was compared with the tuned model."""
    yield from size(figures)
    yield from exactness(figures)


def size(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Bytes of the folder, against the adapter's."""
    yield "size", f"{figures['bytes'] / 1e6:.2f} MB (the adapter: {figures['compact_bytes'] / 1e6:.2f} MB)"


def exactness(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What `proof.compare` found."""
    tokens = f"{figures['tokens']} greedy tokens the same" if figures["tokens"] else "no tokens generated"
    yield "checked", f"greatest difference of a logit {figures['max_difference']:.1e}, {tokens}"


def vllm(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The command that serves a LoRA folder."""
    names = " ".join(sorted({target.rpartition(".")[2] for target in figures["targets"]}))
    flags = f"--enable-lora --max-lora-rank {figures['max_lora_rank']} --lora-target-modules {names}"
    base = figures["base"] if "/" in figures["base"] else "BASE"  # the embedded model has no name that others know
    yield "vLLM", f"vllm serve {base} {flags} --lora-modules NAME={figures['path']}"
