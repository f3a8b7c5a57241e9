"""The settings of a run that decide its result, which a resumed run must share; a checkpoint carries them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from ..core.fingerprint import checksum
from .config import Config

__all__ = ["base_digest", "run_settings"]

# Fields of SFTConfig, by how they begin, that say where a run goes, what is shown and kept of it, and how long it is.
_FREE = ("output_dir", "logging", "log_", "save", "eval", "do_", "hub", "push", "report", "run_name", "project", "trackio")
_FREE += ("disable_tqdm", "max_steps", "num_train_epochs", "dataloader_num", "dataloader_p", "overwrite", "resume", "metric")
_FREE += ("load_best", "greater", "include", "skip_memory", "ddp", "use_cpu", "per_device_eval", "prediction", "debug", "torch")
_FREE += ("restore_callback", "local_rank", "chat_template_path", "accelerator_config", "jit_mode", "enable_jit", "length_column")


def run_settings(config: Config, arguments: Any, base: str) -> dict[str, Any]:
    """The settings of a run, by the names that a run file gives them, as JSON values.

    Args:
        config: of the run.
        arguments: its SFTConfig.
        base: `base_digest` of the model before anything was put on it.
    """
    train = {f"train.{key}": value for key, value in arguments.to_dict().items() if not key.startswith(_FREE)}
    data = {f"data.{key}": _content(value) for key, value in config.data.model_dump(mode="json").items()}
    template = {"train.chat_template_path": _content(config.train.get("chat_template_path"))}
    method = (
        {"method": config.method, "schedule": config.schedule} if config.attached is None else {"attach.lora": config.attach.lora}
    )
    return {"model": base, **method, **data, **train, **template}


def base_digest(model: nn.Module) -> str:
    """Hash of every parameter of a model: names, shapes, types and checksums; a pass over the weights, and no copy."""
    described = [(name, list(p.shape), str(p.dtype), checksum(p.data)) for name, p in model.named_parameters()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _content(value: Any) -> Any:
    """The hash of a file that is named; anything else as it is."""
    if not isinstance(value, str) or not Path(value).is_file():
        return value
    with Path(value).open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:16]}"
