"""Answers of llama.cpp, from an interpreter of its own: one with xllamacpp or llama-cpp-python, which may lack all else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def ask(python: str, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The most likely tokens after each prompt, with each LoRA.

    Args:
        python: the interpreter.
        folder: where the request and its answer are written.
        asked: `base`, a GGUF file; `loras`, name → GGUF file or None; `prompts`, token ids; `top`, how many tokens.

    Returns:
        name → for each prompt, (token, log probability), the most likely first.
    """
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps(asked))
    command = [python, __file__, str(request), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise SystemExit(f"{python}: {''.join(last)}; give --python an interpreter that has xllamacpp or llama-cpp-python")
    return json.loads(answer.read_text())


def answers(asked: dict[str, Any]) -> dict[str, Any]:
    """By adapter and prompt, the best next tokens and their log probabilities; in an interpreter that has llama.cpp."""
    try:
        import xllamacpp  # noqa: F401

        ask = _with_xllamacpp
    except ImportError:
        ask = _with_llama_cpp_python
    return {name: [ask(asked, file, ids) for ids in asked["prompts"]] for name, file in asked["loras"].items()}


def _with_xllamacpp(asked: dict[str, Any], file: str | None, ids: list[int]) -> list[list[float]]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = asked["base"]
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.port = 256, 1, False, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if file is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = file, 1.0
        parameters.lora_adapters = [adapter]
    server = xllamacpp.Server(parameters)
    options = {"n_predict": 1, "temperature": 0.0, "n_probs": asked["top"], "post_sampling_probs": False}
    result = server.handle_completions({"prompt": ids, **options})
    best = result["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return [[entry["id"], entry["logprob"]] for entry in best]


def _with_llama_cpp_python(asked: dict[str, Any], file: str | None, ids: list[int]) -> list[list[float]]:
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(asked["base"], lora_path=file, n_ctx=256, logits_all=True, n_threads=1, verbose=False)
    model.eval(ids)
    logits = np.array(model.scores[len(ids) - 1], dtype=np.float64)
    logs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    return [[int(token), float(logs[token])] for token in logs.argsort()[::-1][: asked["top"]]]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
