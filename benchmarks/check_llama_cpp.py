"""Does llama.cpp compute with our GGUF LoRA what transformers computes with the tuned model? Prints a table.

The embedded SmolLM2 is dequantized into an F32 GGUF, whose weights are those that transformers loads: what differs then is the
LoRA, not the rounding of a quantized base. Each adapter trains other projections, q and k (whose rows GGUF keeps in another
order) among them; one is also written in the wrong order, which must be seen.

    pip install xllamacpp        (or llama-cpp-python, which compiles)
    python benchmarks/check_llama_cpp.py

Exit code 1 where a probability differs by more than --tolerance (nats, of the log), or the wrong order is not seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTS = (
    "The three largest cities of Europe, by the number of people, are",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return",
    "Question: What is 17 + 25, and what is half of it? Answer:",
)
ADAPTERS = {
    "o, down": {"o": 0.12, "down": 0.03},
    "q, k (rotary rows)": {"q": 0.34, "k": 0.34, "o": None, "down": None},
    "v, up, gate": {"v": 0.34, "up": 0.03, "gate": 0.03, "o": None, "down": None},
}
TOP = 5  # most likely next tokens compared per prompt


def main() -> None:
    """Write the files, ask llama.cpp, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerance", type=float, default=3e-2, help="greatest difference of a log probability; default 3e-2")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has xllamacpp or llama-cpp-python")
    parser.add_argument("--ask", nargs=2, metavar=("REQUEST", "ANSWER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        _answer(*map(Path, options.ask))
        return
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(_check(Path(temporary), options.python, options.tolerance))


def _check(folder: Path, python: str, tolerance: float) -> int:
    from intaglio.hf.models import load_model, load_tokenizer

    _dequantize(folder / "base.gguf")
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    cases = dict(_cases(folder, model, prompts))
    request = {"base": str(folder / "base.gguf"), "prompts": prompts, "top": TOP}
    request["loras"] = {name: case["file"] for name, case in cases.items()}
    (folder / "request.json").write_text(json.dumps(request))
    ask = [python, __file__, "--ask", str(folder / "request.json"), str(folder / "answer.json")]
    subprocess.run(ask, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = json.loads((folder / "answer.json").read_text())
    print(f"| adapter | its effect (nats) | greatest difference of the {TOP} best log probabilities | first token the same |")
    print("|---|---|---|---|")
    failed = False
    for name, case in cases.items():
        differences = [_difference(row, case["logs"][i]) for i, row in enumerate(answers[name])]
        same = sum(int(row[0][0] == int(case["logs"][i].argmax())) for i, row in enumerate(answers[name]))
        print(f"| {name} | {case['effect']:.2f} | {max(differences):.1e} | {same}/{len(prompts)} |")
        failed |= (max(differences) > tolerance) != case["wrong"]
    return int(failed)


def _cases(folder: Path, model: Any, prompts: list[list[int]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name → file of the LoRA, log probabilities of the tuned model per prompt, effect, whether it must be wrong."""
    import torch

    from intaglio import S2FT
    from intaglio.export import gguf as gguf_lora
    from intaglio.export.proof import applied

    base = _logs(model, prompts)
    yield "none", {"file": None, "logs": base, "effect": 0.0, "wrong": False}
    for name, shares in ADAPTERS.items():
        torch.manual_seed(0)
        delta = _noise(model, S2FT(**shares))
        target = folder / name.replace(", ", "-").replace(" ", "-")
        gguf_lora.to_gguf(delta, model, target)
        with applied(delta, model):
            logs = _logs(model, prompts)
        effect = max((new - old).abs().max().item() for new, old in zip(logs, base, strict=True))
        yield name, {"file": str(target / gguf_lora.FILE), "logs": logs, "effect": effect, "wrong": False}
        if "rotary" in name:
            wrong = folder / "wrong.gguf"
            _write_in_base_order(gguf_lora, delta, model, wrong)
            yield "q, k in the base's order", {"file": str(wrong), "logs": logs, "effect": effect, "wrong": True}


def _noise(model: Any, method: Any) -> Any:
    """A Delta whose change is a tenth of each weight's spread: large, so that an error shows."""
    import torch

    from intaglio import Delta, Selection
    from intaglio.core.fingerprint import fingerprint

    chosen = method.choose({}, model, 0, None, Selection())[0]
    parameters, values, prints = dict(model.named_parameters()), {}, {}
    for name, entries in chosen.items():
        base = entries.gather(parameters[name])
        values[name] = base + 0.5 * base.std() * torch.randn_like(base)
        prints[name] = fingerprint(base)
    return Delta(chosen, values, prints)


def _write_in_base_order(module: Any, delta: Any, model: Any, path: Path) -> None:
    """What a writer that knows nothing of rotary rows would write."""
    import torch

    from intaglio.export.lora import factors
    from intaglio.export.peft_folder import differences

    changes, architecture = differences(delta, model), module.ARCHITECTURES["llama"]
    paths = {name.removesuffix(".weight") for name in changes}
    names = module._tensor_names(architecture, paths, model.config.num_hidden_layers)
    pairs = {}
    for name, change in changes.items():
        rank = delta.selection[name].index.numel()
        pairs[names[name.removesuffix(".weight")]] = factors(delta.selection[name], change, rank, False)
    module._write(path, architecture, pairs, torch.float32, None)


def _logs(model: Any, prompts: list[list[int]]) -> list[Any]:
    """Log probabilities of the token after each prompt."""
    import torch

    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) for ids in prompts]


def _difference(row: list[list[float]], logs: Any) -> float:
    return max(abs(found - logs[int(token)].item()) for token, found in row)


def _dequantize(target: Path) -> None:
    """The embedded GGUF with every tensor in F32."""
    import gguf
    import gguf.quants

    from intaglio.hf.models import _embedded_file

    reader = gguf.GGUFReader(_embedded_file("smollm2-135m"))
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kinds = field.types
        value = gguf.LlamaFileType.ALL_F32.value if key == "general.file_type" else field.contents()
        writer.add_key_value(key, value, kinds[0], kinds[1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _answer(request: Path, answer: Path) -> None:
    """In the other interpreter: the best next tokens and their log probabilities, by adapter and prompt."""
    asked = json.loads(request.read_text())
    try:
        import xllamacpp  # noqa: F401

        ask = _with_xllamacpp
    except ImportError:
        ask = _with_llama_cpp_python
    found = {name: [ask(asked, file, ids) for ids in asked["prompts"]] for name, file in asked["loras"].items()}
    answer.write_text(json.dumps(found))


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
    main()
