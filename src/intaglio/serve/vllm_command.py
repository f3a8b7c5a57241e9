"""vLLM's server in place of ours: adapters exported as LoRA, and flags that lose none of them silently."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter.delta import Delta
from ..adapter.folder import PEFT_TYPE, TEMPLATE, own_template, read_config
from ..doctor.command_lines import Start, shell
from ..doctor.engines import ENGINES
from ..doctor.examine import examine
from ..export.lora import to_lora
from ..hf.models import load_model, model_path
from ..runs.folder import adapter_of
from ..runs.load import template_of

if TYPE_CHECKING:
    from .run import Options

__all__ = ["run"]

_VLLM = ENGINES["vllm"]


def run(options: Options, adapters: Mapping[str, Path]) -> str:
    """Export the adapters and become vLLM's server.

    vLLM takes the key from its environment, so that no list of processes shows it, and there too what `doctor` says it needs.

    Args:
        options: checked ones. Earlier exports in the folder for LoRAs are replaced; a dry run exports and starts nothing.
        adapters: name → adapter folder or run.

    Returns:
        The command as a shell takes it, for a dry run; otherwise this process ends as vLLM's.

    Raises:
        ValueError: where vLLM is not installed, for no adapter, more keys than one, or what vLLM would not serve rightly, as
            `doctor` tells.
    """
    _check(options, adapters)
    sources = {name: adapter_of(path)[0] for name, path in adapters.items()}
    template = _template(adapters)
    given = [f"{name}={folder}" for name, folder in sources.items()]
    found = examine(given, _VLLM.name, base=options.base)["engines"][_VLLM.name]
    if found["refused"]:
        raise ValueError(f"--engine vllm: {'; '.join(found['refused'])}")
    trained = [name for name, folder in sources.items() if read_config(folder).get("peft_type") == PEFT_TYPE]
    folders = sources | {name: options.export_dir / name for name in trained}
    if itself := [name for name in trained if folders[name].resolve() == sources[name].resolve()]:
        place = str(options.export_dir)
        raise ValueError(f"--export-dir {place!r}: {itself[0]!r} lies there itself and would be replaced; give another folder")
    command = _VLLM.dialect.write(
        Start(
            model_path(options.base),
            folders,
            **{figure: found[figure] for figure in ("rank", "targets", "slots", "dtype")},
            python=sys.executable,
            served_name=options.served_name,
            host=options.host,
            port=options.port,
            max_context=options.max_context,
        )
    )
    if template is not None:
        command += ["--chat-template", str(template)]
    if options.dry_run:
        return shell(command, found["environment"])
    if trained:  # the base is loaded once
        model = load_model(options.base, dtype=found["dtype"])
        for name in trained:
            to_lora(Delta.load(sources[name]), model, folders[name], overwrite=True)
    key = {"VLLM_API_KEY": options.api_key[0]} if options.api_key else {}
    return os.execvpe(command[0], command, os.environ | found["environment"] | key)  # noqa: S606


def _template(adapters: Mapping[str, Path]) -> Path | None:
    """The file of the one chat template that all adapters were trained with; None where it is the base's.

    Raises:
        ValueError: where they have several, of which vLLM would use one for all.
    """
    texts = {name: template_of(path) for name, path in adapters.items()}
    if len(set(texts.values())) > 1:
        listed = ", ".join(f"{name} ({'its own' if text is not None else 'the base'}'s)" for name, text in texts.items())
        raise ValueError(
            f"--engine vllm: the adapters were trained with several chat templates, {listed}, and vLLM has one for all: serve "
            "each kind by itself, or leave --engine out"
        )
    name, text = next(iter(texts.items()))
    if text is None:
        return None
    folder, run = adapter_of(adapters[name])
    if own_template(folder) is not None or run is None:
        return folder / TEMPLATE
    return Path(run["config"]["train"]["chat_template_path"])


def _check(options: Options, adapters: Mapping[str, Path]) -> None:
    if not adapters:
        raise ValueError("--engine vllm: give at least one --adapter NAME=PATH; without adapters run vLLM itself")
    if len(options.api_key or ()) > 1:
        raise ValueError(f"--api-key: vLLM takes one key, {len(options.api_key or ())} given")
    if not options.dry_run and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"--engine vllm: vLLM is not installed here: pip install 'vllm>={_VLLM.oldest}'. --dry-run prints the command for "
            "elsewhere; without --engine Intaglio serves by itself"
        )
