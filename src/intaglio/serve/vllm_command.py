"""Hand the adapters to vLLM: export them as LoRA, and start its server with flags that lose none of them silently."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["run", "vllm_command"]


def vllm_command(
    base: str,
    folders: Mapping[str, Path],
    settings: Mapping[str, Any],
    *,
    served_name: str,
    host: str,
    port: int,
    max_context: int | None = None,
) -> list[str]:
    """The command that serves these adapters with vLLM.

    Args:
        base: folder or hub name of the base.
        folders: name → folder of its LoRA.
        settings: rank, targets, slots and dtype, as `doctor` finds them for vLLM.
        served_name: what callers give as `model` for the base.
        host: address to listen on.
        port: port to listen on.
        max_context: tokens of prompt and answer; default the model's.

    Source: vLLM 0.32, `python -m vllm.entrypoints.openai.api_server --help`.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", served_name]
    command += ["--host", host, "--port", str(port), *_typed(settings["dtype"])]
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
        ValueError: where vLLM is not installed, for no adapter, more keys than one, or what vLLM would not serve rightly, as
            `doctor` tells.
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
    from ..adapter.folder import PEFT_TYPE, read_config
    from ..doctor.examine import examine
    from ..hf.models import model_path
    from ..runs.folder import adapter_of

    sources = {name: adapter_of(path)[0] for name, path in adapters.items()}
    found = examine([f"{name}={folder}" for name, folder in sources.items()], "vllm", base=base)["engines"]["vllm"]
    if found["refused"]:
        raise ValueError(f"--engine vllm: {'; '.join(found['refused'])}")
    trained = [name for name, folder in sources.items() if read_config(folder).get("peft_type") == PEFT_TYPE]
    folders = {name: output / name if name in trained else folder for name, folder in sources.items()}
    if itself := [name for name in trained if folders[name].resolve() == sources[name].resolve()]:
        raise ValueError(
            f"--export-dir {str(output)!r}: {itself[0]!r} lies there itself and would be replaced; give another folder"
        )
    command = vllm_command(model_path(base), folders, found, **options)
    if dry_run:
        return shlex.join(command)
    _export(base, {name: sources[name] for name in trained}, folders, found["dtype"])
    environment = os.environ | ({"VLLM_API_KEY": keys[0]} if keys else {})
    return os.execvpe(command[0], command, environment)  # noqa: S606


def _typed(dtype: str | None) -> list[str]:
    return ["--dtype", dtype] if dtype else []


def _export(base: str, sources: Mapping[str, Path], folders: Mapping[str, Path], dtype: str | None) -> None:
    """Write the LoRA folders, each checked against its adapter; the base is loaded once."""
    if not sources:
        return
    from ..adapter.delta import Delta
    from ..export.lora import to_lora
    from ..hf.models import load_model

    model = load_model(base, dtype=dtype)
    for name, folder in sources.items():
        to_lora(Delta.load(folder), model, folders[name], overwrite=True)
