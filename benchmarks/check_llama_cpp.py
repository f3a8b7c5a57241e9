"""Agreement of llama.cpp, on our GGUF LoRA, with transformers, on the tuned model; as a table.

The embedded SmolLM2 is dequantized into an F32 GGUF, whose weights are those that transformers loads: what differs then is the
LoRA, not the rounding of a quantized base. Each adapter trains other projections, q and k (whose rows GGUF keeps in another
order) among them; one is also written in the wrong order, which must be seen.

    pip install xllamacpp        (or llama-cpp-python, which compiles)
    python benchmarks/check_llama_cpp.py

Exit code 1 where a probability differs by more than --tolerance (nats, of the log), or the wrong order is not seen.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib import command_line, gguf_engines
from lib.tables import row, table

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
    parser = command_line.parser(__doc__)
    parser.add_argument("--tolerance", type=float, default=3e-2, help="greatest difference of a log probability; default 3e-2")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has xllamacpp or llama-cpp-python")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(_check(Path(temporary), options.python, options.tolerance))


def _check(folder: Path, python: str, tolerance: float) -> int:
    from intaglio.hf.models import load_model, load_tokenizer

    _dequantize(folder / "base.gguf")
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    cases = dict(_cases(folder, model, prompts))
    asked = {"base": str(folder / "base.gguf"), "prompts": prompts, "top": TOP}
    answers = gguf_engines.ask(python, folder, asked | {"loras": {name: case["file"] for name, case in cases.items()}})
    head = f"| adapter | its effect (nats) | greatest difference of the {TOP} best log probabilities | first token the same |"
    print("\n".join(table(head, [], "llll")))
    failed = False
    for name, case in cases.items():
        differences = [_difference(best, case["logs"][i]) for i, best in enumerate(answers[name])]
        same = sum(int(best[0][0] == int(case["logs"][i].argmax())) for i, best in enumerate(answers[name]))
        print(row([name, f"{case['effect']:.2f}", f"{max(differences):.1e}", f"{same}/{len(prompts)}"]))
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
    """A Delta whose change is half of each weight's spread: large, so that an error shows."""
    import torch

    from intaglio import attach
    from lib.random_adapters import changed

    tuner = attach(model, method)
    places = tuner.selection.items()
    tuner.detach()
    return changed(dict(model.named_parameters()), places, lambda name, base: base + 0.5 * base.std() * torch.randn_like(base))


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


def _difference(best: list[list[float]], logs: Any) -> float:
    return max(abs(found - logs[int(token)].item()) for token, found in best)


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


if __name__ == "__main__":
    main()
