"""Hand the adapters to vLLM: export them as LoRA, and start its server with flags that lose none of them silently."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["run", "vllm_command"]


def vllm_command(
    base: str,
    folders: Mapping[str, Path],
    settings: Mapping[str, Any],
    *,
    dtype: str | None,
    served_name: str,
    host: str,
    port: int,
    max_context: int | None = None,
) -> list[str]:
    """The command that serves these adapters with vLLM.

    Args:
        base: folder or hub name of the base.
        folders: name → folder of its LoRA.
        settings: rank, targets and slots, as `doctor` finds them for vLLM.
        dtype: that the base must be loaded in, e.g. "bfloat16"; None where any will do.
        served_name: what callers give as `model` for the base.
        host: address to listen on.
        port: port to listen on.
        max_context: tokens of prompt and answer; default the model's.

    Source: vLLM 0.32, `python -m vllm.entrypoints.openai.api_server --help`.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", served_name]
    command += ["--host", host, "--port", str(port), *(["--dtype", dtype] if dtype else [])]
    command += [] if max_context is None else ["--max-model-len", str(max_context)]
    command += ["--enable-lora", "--max-lora-rank", str(settings["rank"]), "--max-loras", str(settings["slots"])]
    command += ["--max-cpu-loras", str(len(folders)), "--lora-target-modules", *settings["targets"]]
    return [*command, "--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]


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
        ValueError: where vLLM is not installed, for no adapter, more keys than one, adapters that need the base in different
            types, or what vLLM would not serve rightly, as `doctor` tells.
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
    from ..doctor.examine import examine
    from ..hf.models import model_path
    from ..run_folder import adapter_of

    sources = {name: adapter_of(path)[0] for name, path in adapters.items()}
    found = examine([f"{name}={folder}" for name, folder in sources.items()], "vllm", base=base)["engines"]["vllm"]
    if found["refused"]:
        raise ValueError(f"--engine vllm: {'; '.join(found['refused'])}")
    trained = {name: dtype for name, folder in sources.items() if (dtype := _dtype(folder)) is not None}
    options["dtype"] = _one(trained.values())
    folders = {name: output / name if name in trained else folder for name, folder in sources.items()}
    if dry_run:
        return shlex.join(vllm_command(base, folders, found, **options))
    command = vllm_command(model_path(base), folders, found, **options)
    _export(base, {name: sources[name] for name in trained}, folders, options["dtype"])
    environment = os.environ | ({"VLLM_API_KEY": keys[0]} if keys else {})
    return os.execvpe(command[0], command, environment)  # noqa: S606


def _dtype(folder: Path) -> str | None:
    """The type of the base that an adapter of ours was trained on; None for a stock LoRA, which fits any."""
    from ..adapter_folder import read_config

    return next((fields["dtype"] for fields in read_config(folder).get("parameters", {}).values()), None)


def _one(dtypes: Collection[str]) -> str | None:
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"--adapter: the adapters need the base in different types ({', '.join(sorted(set(dtypes)))}); serve them apart"
        )
    return next(iter(dtypes), None)


def _export(base: str, sources: Mapping[str, Path], folders: Mapping[str, Path], dtype: str | None) -> None:
    """Write the LoRA folders, each checked against its adapter; the base is loaded once."""
    if not sources:
        return
    from ..delta import Delta
    from ..hf.lora import to_lora
    from ..hf.models import load_model

    model = load_model(base, dtype=dtype)
    for name, folder in sources.items():
        to_lora(Delta.load(folder), model, folders[name], overwrite=True)
