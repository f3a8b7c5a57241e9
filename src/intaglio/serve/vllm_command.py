"""Hand the adapters to vLLM: export them as LoRA, and start its server with flags that lose none of them silently."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Lora", "describe", "run", "vllm_command"]

_MOST_SLOTS = 8  # each takes memory by rank and modules, used or not; more adapters than that take turns


@dataclass(frozen=True)
class Lora:
    """What vLLM must be told of one adapter.

    Attributes:
        name: what callers give as `model`.
        source: an adapter folder of Intaglio's, or a stock LoRA.
        rank: of the LoRA, as stored.
        targets: last names of the modules it changes.
        dtype: that the base must be loaded in, e.g. "bfloat16"; None where any will do.
    """

    name: str
    source: Path
    rank: int
    targets: frozenset[str]
    dtype: str | None

    @property
    def stock(self) -> bool:
        """Whether it is a stock LoRA already."""
        return self.dtype is None


def describe(name: str, path: Path) -> Lora:
    """Read what vLLM must be told of an adapter; no model is loaded.

    Raises:
        ValueError: for a damaged folder, or one that no LoRA can hold.
    """
    from ..adapter_folder import WEIGHTS, read_config
    from ..run_folder import adapter_of

    folder, _ = adapter_of(path)
    if read_config(folder).get("peft_type") == "LORA":
        rank, targets = _stock(folder, WEIGHTS)
        return Lora(name, folder, rank, targets, None)
    from ..delta import Delta
    from ..hf.lora import lora_rank

    delta = Delta.load(folder)
    targets = frozenset(parameter.split(".")[-2] for parameter in delta.selection)
    dtype = str(next(iter(delta.values.values())).dtype).removeprefix("torch.")
    return Lora(name, folder, lora_rank(delta.selection), targets, dtype)


def vllm_command(
    base: str,
    loras: Sequence[Lora],
    folders: Mapping[str, Path],
    *,
    served_name: str,
    host: str,
    port: int,
    max_context: int | None = None,
) -> list[str]:
    """The command that serves these adapters with vLLM: the smallest rank it takes, just the modules that are needed.

    vLLM drops modules outside `--lora-target-modules` without a word, and reserves memory by `--max-lora-rank`.

    Args:
        base: folder or hub name of the base.
        loras: the adapters, at least one.
        folders: name → folder of its LoRA.
        served_name: what callers give as `model` for the base.
        host: address to listen on.
        port: port to listen on.
        max_context: tokens of prompt and answer; default the model's.

    Raises:
        ValueError: where the adapters need different types of the base, or a rank above 512.

    Source: vLLM 0.32, `python -m vllm.entrypoints.openai.api_server --help`.
    """
    dtypes = {lora.dtype for lora in loras if lora.dtype is not None}
    if len(dtypes) > 1:
        raise ValueError(
            f"--adapter: the adapters need the base in different types ({', '.join(sorted(dtypes))}); serve them apart"
        )
    slots = str(min(len(loras), _MOST_SLOTS))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", served_name]
    command += ["--host", host, "--port", str(port), *(["--dtype", dtypes.pop()] if dtypes else [])]
    command += [] if max_context is None else ["--max-model-len", str(max_context)]
    command += ["--enable-lora", "--max-lora-rank", str(_rank(loras)), "--max-loras", slots, "--max-cpu-loras", str(len(loras))]
    command += ["--lora-target-modules", *sorted(frozenset[str]().union(*(lora.targets for lora in loras)))]
    return [*command, "--lora-modules", *(f"{lora.name}={folders[lora.name]}" for lora in loras)]


def run(
    base: str,
    adapters: Mapping[str, Path],
    *,
    output: Path,
    dry_run: bool,
    keys: Sequence[str] = (),
    **options: Any,
) -> str:
    """Export the adapters and become vLLM's server.

    Args:
        base: as `load_model` takes it.
        adapters: name → adapter folder or run.
        output: the folder for the LoRA folders; earlier exports in it are replaced.
        dry_run: export and start nothing.
        keys: vLLM takes one, from its environment, so that no list of processes shows it.
        options: `vllm_command`'s.

    Returns:
        The command as a shell takes it, for a dry run; otherwise this process ends as vLLM's.

    Raises:
        ValueError: where vLLM is not installed, for no adapter, more keys than one, or what `describe` refuses.
    """
    if not adapters:
        raise ValueError("--engine vllm: give at least one --adapter NAME=PATH; without adapters run vLLM itself")
    if len(keys) > 1:
        raise ValueError(f"--api-key: vLLM takes one key, {len(keys)} given")
    if not dry_run and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm: vLLM is not installed here: pip install 'vllm>=0.32'. --dry-run prints the command for elsewhere; "
            "without --engine Intaglio serves by itself"
        )
    loras = [describe(name, path) for name, path in adapters.items()]
    folders = {lora.name: lora.source if lora.stock else output / lora.name for lora in loras}
    if dry_run:
        return shlex.join(vllm_command(base, loras, folders, **options))
    from ..hf.models import model_path

    command = vllm_command(model_path(base), loras, folders, **options)
    _export(base, [lora for lora in loras if not lora.stock], folders)
    environment = os.environ | ({"VLLM_API_KEY": keys[0]} if keys else {})
    return os.execvpe(command[0], command, environment)  # noqa: S606


def _export(base: str, loras: Sequence[Lora], folders: Mapping[str, Path]) -> None:
    """Write the LoRA folders, each checked against its adapter; the base is loaded once."""
    if not loras:
        return
    from ..delta import Delta
    from ..hf.lora import to_lora
    from ..hf.models import load_model

    model = load_model(base, dtype=loras[0].dtype)
    for lora in loras:
        to_lora(Delta.load(lora.source), model, folders[lora.name], overwrite=True)


def _rank(loras: Sequence[Lora]) -> int:
    from ..hf.lora import RANKS

    widest = max(loras, key=lambda lora: lora.rank)
    fitting = [rank for rank in RANKS if rank >= widest.rank]
    if not fitting:
        raise ValueError(f"--adapter {widest.name}: rank {widest.rank}; vLLM takes at most {RANKS[-1]}")
    return fitting[0]


def _stock(folder: Path, weights: str) -> tuple[int, frozenset[str]]:
    """Greatest rank and modules of a stock LoRA, from the shapes in its file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / weights, "pt") as file:
            ranks = {key.split(".")[-3]: file.get_slice(key).get_shape()[0] for key in file.keys() if ".lora_A." in key}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / weights}: missing or damaged ({error})") from error
    if not ranks:
        raise ValueError(f"{folder / weights}: holds no LoRA factors")
    return max(ranks.values()), frozenset(ranks)
