"""Registration with vLLM, which calls `register` once in every process it starts (entry point `vllm.general_plugins`).

The plugin acts only where it is asked for: whoever installs Intaglio beside a vLLM has asked for nothing yet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

__all__ = ["NAME", "PLUGINS", "SWITCH", "TESTED", "refusal", "register", "setting"]

TESTED = ("0.32.0",)  # vLLM's internals change from release to release
SWITCH = "INTAGLIO_VLLM"  # unset or 0: off; 1: with a tested vLLM; force: with any
PLUGINS = "VLLM_PLUGINS"  # vLLM's own: the names of the plugins that it loads, with commas between; unset: all that there are
NAME = "intaglio"  # of our entry point, as that variable calls it

# A child of vLLM's logger, whose handlers and format it uses.
_logger = logging.getLogger("vllm.intaglio")


def register() -> None:
    """Let vLLM keep one-hot LoRA adapters as index and values; any other adapter, and everything else, stays vLLM's own.

    Does nothing where nobody asked for it. Where it was asked for and may not act, vLLM is left as it is, with one warning
    that says why. Calling it again changes nothing.
    """
    asked = setting(os.environ)
    if asked == "0":
        _logger.debug("Intaglio's plugin is off; %s=1 switches it on", SWITCH)
        return
    import vllm  # pyright: ignore[reportMissingImports]

    active, reason = False, refusal(asked, vllm.__version__)
    try:
        if reason is None:
            from .linear import install

            active = install()
    except (ImportError, AttributeError) as error:  # only with "force": a version that has other classes
        reason = f"vLLM {vllm.__version__} lacks what it builds on ({error}); it is tested with {TESTED[0]}"
    if reason is not None:
        _logger.warning("Intaglio's plugin stays out, adapters take vLLM's own path: %s", reason)
    elif active:
        _logger.info("Intaglio's plugin is active: one-hot LoRA adapters are kept as index and values (%s=0: off)", SWITCH)


def setting(environment: Mapping[str, str]) -> str:
    """What an environment asks of the plugin: "0" (nothing, the default), "1" or "force"; or a value that is none of these.

    INTAGLIO_VLLM says it; where that is unset, vLLM's own VLLM_PLUGINS asks for "1" by naming the plugin.

    Example:
        >>> setting({}), setting({"VLLM_PLUGINS": "intaglio"}), setting({"VLLM_PLUGINS": "intaglio", "INTAGLIO_VLLM": "0"})
        ('0', '1', '0')
    """
    return environment.get(SWITCH) or ("1" if NAME in environment.get(PLUGINS, "").split(",") else "0")


def refusal(asked: str, version: str) -> str | None:
    """Why the plugin must not act, though it was asked to; None where it may.

    Args:
        asked: `setting`'s answer: "1" or "force".
        version: of vLLM; a local part ("+cpu") does not count.

    Example:
        >>> refusal("1", "0.32.0+cpu") is None, refusal("force", "0.40.0") is None
        (True, True)
    """
    if asked not in ("1", "force"):
        return f"{SWITCH}={asked!r}; give 0 (off), 1 (with vLLM {' or '.join(TESTED)}) or force (with any version)"
    if asked == "1" and version.partition("+")[0] not in TESTED:
        return f"it is tested with vLLM {' and '.join(TESTED)}, this is {version}; {SWITCH}=force tries it all the same"
    return None
