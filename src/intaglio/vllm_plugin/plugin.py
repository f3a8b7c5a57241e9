"""Registration with vLLM, which calls `register` once in every process it starts (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import logging
import os

__all__ = ["SWITCH", "TESTED", "refusal", "register"]

TESTED = ("0.32.0",)  # vLLM's internals change from release to release
SWITCH = "INTAGLIO_VLLM"  # 0: off; 1, the default: with a tested vLLM; force: with any

# A child of vLLM's logger, whose handlers and format it uses.
_logger = logging.getLogger("vllm.intaglio")


def register() -> None:
    """Let vLLM keep one-hot LoRA adapters as index and values; any other adapter, and everything else, stays vLLM's own.

    Where it may not act, vLLM is left as it is, with one warning that says why. Calling it again changes nothing.
    """
    setting = os.environ.get(SWITCH, "1")
    if setting == "0":
        return
    import vllm  # pyright: ignore[reportMissingImports]

    reason = refusal(setting, vllm.__version__)
    try:
        active = reason is None and _install()
    except (ImportError, AttributeError) as error:  # only with "force": a version that has other classes
        active, reason = False, f"vLLM {vllm.__version__} lacks what it builds on ({error}); it is tested with {TESTED[0]}"
    if reason is not None:
        _logger.warning("Intaglio's plugin stays out, adapters take vLLM's own path: %s", reason)
    elif active:
        _logger.info("Intaglio's plugin is active: one-hot LoRA adapters are kept as index and values (%s=0: off)", SWITCH)


def _install() -> bool:
    from .linear import install

    return install()


def refusal(setting: str, version: str) -> str | None:
    """Why the plugin must not act, or None where it may.

    Args:
        setting: of the environment variable INTAGLIO_VLLM: "1" or "force".
        version: of vLLM; a local part ("+cpu") does not count.

    Example:
        >>> refusal("1", "0.32.0+cpu") is None, refusal("force", "0.40.0") is None
        (True, True)
    """
    if setting not in ("1", "force"):
        return f"{SWITCH}={setting!r}; give 0 (off), 1 (with vLLM {' or '.join(TESTED)}) or force (with any version)"
    if setting == "1" and version.partition("+")[0] not in TESTED:
        return f"it is tested with vLLM {' and '.join(TESTED)}, this is {version}; {SWITCH}=force tries it all the same"
    return None
