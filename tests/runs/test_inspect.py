"""inspect: the counts are those of the selection, the picture shows them, and no model is loaded."""

import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from intaglio import S2FT, Delta, Full, Random, attach
from intaglio.cli import app
from intaglio.core.entries import Elements, Slices, Whole
from intaglio.core.fingerprint import fingerprint
from intaglio.core.selection import Selection
from intaglio.report.heatmap import density_panel, position_panel
from intaglio.runs.inspect import grid, inspect
from support import tiny

EVERY = S2FT(q=0.25, k=0.5, v=0.5, o=0.25, up=0.25, gate=0.25, down=0.25)


def save(folder, method=EVERY, name="gqa_llama"):
    return attach(tiny.build(name), method).save(folder)


def save_selection(folder, selection):
    values = {name: torch.zeros(entries.values_shape) for name, entries in selection.items()}
    return Delta(selection, values, {name: fingerprint(v) for name, v in values.items()}).save(folder)


def columns(*index, width=8, rows=4):
    return Slices((rows, width), 1, torch.tensor(index))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_counts_are_those_of_the_selection(tmp_path, name):
    """Over layers and projections they add up, for every architecture; entries of one cell are counted by hand."""
    adapter = save(tmp_path / "adapter", S2FT(o=0.5, down=0.25), name)
    result, selection = inspect(adapter), Delta.load(adapter).selection
    assert result["entries"] == selection.size == sum(p["entries"] for p in result["projections"].values())
    assert result["parameters"] == len(selection)
    assert not result["other"]
    assert len(result["projections"]) == (3 if name in ("qwen2_moe", "latent_deepseek_v3") else 2)  # their first layer is dense
    for projection, record in result["projections"].items():
        parameters = [e for n, e in selection.items() if re.search(rf"\.\d\.{projection}(\.weight)?$", n)]
        assert list(record["chosen"].values()) == [entries.index.numel() for entries in parameters]
        assert record["share"] == record["entries"] / sum(entries.numel for entries in parameters)
        assert record["least"] == min(record["chosen"].values())
    assert (tmp_path / "adapter/selection.png").read_bytes().startswith(b"\x89PNG")


def test_heads_are_found_as_blocks(tmp_path):
    projections = inspect(save(tmp_path / "adapter"))["projections"]
    assert list(projections) == [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert {n: p["block"] for n, p in projections.items() if "attn" in n} == {f"self_attn.{x}_proj": 8 for x in "qkvo"}
    assert projections["mlp.down_proj"]["block"] == 1
    assert projections["self_attn.o_proj"]["along"] == "columns"
    assert projections["self_attn.q_proj"]["along"] == "rows"


@pytest.mark.parametrize(
    ("chosen", "block"),
    [
        (([2, 3], [4, 5]), 2),
        (([0, 1, 2, 3],), 4),
        (([0, 1, 2, 3], [6, 7]), 2),
        (([1, 2],), 1),
        (([2, 3, 5],), 1),
        (([7],), 1),
        (([0, 1, 2, 3, 4, 5, 6, 7],), 8),
    ],
)
def test_block_width_is_the_greatest_that_fits_all_layers(tmp_path, chosen, block):
    selection = Selection({f"h.{i}.o.weight": columns(*index) for i, index in enumerate(chosen)})
    assert inspect(save_selection(tmp_path / "adapter", selection))["projections"]["o"]["block"] == block


def test_other_parameters_are_kept_apart(tmp_path):
    adapter = save(tmp_path / "adapter", Full(), "qkv_bias_qwen2")
    result = inspect(adapter)
    assert result["other"]["model.layers.*.self_attn.q_proj.bias"] == {"kind": "whole", "parameters": 2, "entries": 64}
    assert result["other"]["lm_head.weight"]["parameters"] == 1
    apart = sum(record["entries"] for record in result["other"].values())
    assert result["entries"] == apart + sum(p["entries"] for p in result["projections"].values())
    biases = save_selection(tmp_path / "biases", Selection({"h.0.q.bias": Whole((4,))}))
    assert inspect(biases)["picture"] is None


def test_experts_and_stacks():
    """Experts of one layer share a cell; projections of an encoder and a decoder stay apart."""
    names = ["encoder.layers.0.mlp.experts.0.up.weight", "encoder.layers.0.mlp.experts.1.up.weight"]
    projections, other = grid(Selection({name: columns(1) for name in names}))
    assert list(projections) == ["mlp.experts.*.up"]
    assert len(projections["mlp.experts.*.up"][0]) == 2
    assert not other
    projections, _ = grid(Selection({"encoder.layers.0.up.weight": columns(1), "decoder.layers.0.up.weight": columns(1)}))
    assert list(projections) == ["encoder.layers: up", "decoder.layers: up"]


def test_projections_keep_the_order_of_the_model():
    """Also where the first layer lacks one."""
    names = ["h.0.down.weight", "h.1.o.weight", "h.1.down.weight"]
    assert list(grid(Selection({name: columns(1) for name in names}))[0]) == ["o", "down"]


# the picture


def test_panels_show_what_is_chosen():
    layers = {0: [columns(0, 1, 6, 7)], 2: [columns(2, 3)]}
    panel = position_panel("self_attn.o_proj", layers, depth=4, block=2)
    assert panel.share.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert panel.axis == "head (2 wide)"
    assert panel.is_binary
    single = position_panel("mlp.down_proj", layers, depth=3, block=1)
    assert single.share.sum(1).tolist() == [4, 0, 2]
    assert single.axis == "column of the weight"


@pytest.mark.parametrize("width", [128, 129, 255, 1536, 11008])
def test_wide_projections_are_binned_by_share(width):
    """Every bin is the share of its own channels: all chosen gives 1 everywhere, weighted shares give the count back."""
    everything = position_panel("down", {0: [columns(*range(width), width=width)]}, depth=1, block=1)
    assert everything.share.shape == (1, 128)
    torch.testing.assert_close(everything.share, torch.ones(1, 128))
    index = torch.randperm(width, generator=torch.Generator().manual_seed(0))[: width // 5].sort().values
    some = position_panel("down", {0: [Slices((4, width), 1, index)]}, depth=1, block=1)
    sizes = torch.bincount(torch.arange(width) * 128 // width)
    torch.testing.assert_close((some.share * sizes).sum(), torch.tensor(float(len(index))))


def test_scattered_entries_are_shown_as_shares():
    layers = {1: [Elements((4, 8), torch.arange(8))]}
    panel = density_panel({"q": {0: [Whole((4, 8))]}, "k": layers}, depth=2)
    assert panel.share.tolist() == [[1, 0], [0, 0.25]]
    assert panel.names == ("q", "k")


@pytest.mark.parametrize("method", [EVERY, Random(budget=0.05), Full()], ids=lambda m: m.name)
def test_pictures_of_every_kind_are_drawn(tmp_path, method):
    from matplotlib.image import imread

    result = inspect(save(tmp_path / "adapter", method), output=tmp_path / "pictures/one.png")
    assert result["picture"] == str(tmp_path / "pictures/one.png")
    pixels = imread(result["picture"])
    assert pixels.shape[0] > 300
    assert pixels.std() > 0.05
    assert not (tmp_path / "adapter/selection.png").exists()


def test_output_must_be_a_picture_or_a_folder(tmp_path):
    adapter = save(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"pictures are PNG; give a name that ends in \.png, or a folder"):
        inspect(adapter, output=tmp_path / "picture.jpg")
    assert inspect(adapter, output=tmp_path / "folder")["picture"] == str(tmp_path / "folder/selection.png")


# two adapters


@pytest.mark.parametrize("methods", [(EVERY, S2FT(o=0.5, down=0.5, seed=3)), (EVERY, Random(budget=0.1)), (Full(), Full())])
def test_overlap_is_that_of_the_sets(tmp_path, methods):
    one, two = (save(tmp_path / str(i), method) for i, method in enumerate(methods))
    result = inspect(one, other=two)["overlap"]
    sets = [{(n, i) for n, e in Delta.load(p).selection.items() for i in e.flat().tolist()} for p in (one, two)]
    both = sets[0] & sets[1]
    assert result["entries"] == len(both) == sum(result["projections"].values()) > 0
    assert result["share"] == len(both) / len(sets[0])
    assert result["share_of_other"] == len(both) / len(sets[1])
    assert result["disjoint"] is False
    assert result["projections"].get("mlp.down_proj", 0) == sum("down_proj" in name for name, _ in both)


def test_disjoint_adapters_are_called_so(tmp_path):
    model = tiny.build("gqa_llama")
    tuner = attach(model, S2FT(o=0.25, down=0.25))
    one = tuner.save(tmp_path / "one")
    tuner.detach()
    two = attach(model, S2FT(o=0.25, down=0.25), exclude=tuner.selection).save(tmp_path / "two")
    overlap = inspect(one, other=two)["overlap"]
    assert overlap["disjoint"] is True
    assert overlap["entries"] == overlap["share"] == 0
    assert "none: disjoint" in CliRunner().invoke(app, ["inspect", str(one), "--with", str(two)]).stdout


def test_adapters_of_different_models_are_refused(tmp_path):
    one = save_selection(tmp_path / "one", Selection({"h.0.o.weight": columns(1)}))
    two = save_selection(tmp_path / "two", Selection({"h.0.o.weight": columns(1, width=9)}))
    with pytest.raises(ValueError, match=r"h\.0\.o\.weight: shapes \[4, 8\] and \[4, 9\]: .* different models"):
        inspect(one, other=two)


# the command


@pytest.fixture
def run(tmp_path):
    """A finished run's folder, as far as inspect reads it."""
    save(tmp_path / "run/adapter")
    of = sum(p.numel() for p in tiny.build("gqa_llama").parameters())
    (tmp_path / "run/run.json").write_text(json.dumps({"config": {}, "trainable": {"of": of}}))
    return tmp_path / "run"


def test_a_run_knows_its_share_of_the_model(run):
    done = CliRunner().invoke(app, ["inspect", str(run), "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["share"] == result["entries"] / result["of"]
    assert result["picture"] == str(run / "selection.png")
    text = CliRunner().invoke(app, ["inspect", str(run)]).stdout
    for part in ("s2ft", f"{result['entries']:,} weights", "self_attn.o_proj", "blocks of 8 columns, of 4", "columns of 48"):
        assert part in text


def test_no_model_library_is_loaded(run):
    code = f"""
import sys
from pathlib import Path
from intaglio.runs.inspect import inspect
assert inspect(Path({str(run)!r}))["picture"]
assert not {{"transformers", "peft", "trl"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not an adapter folder"),
        ("{", "damaged, not JSON"),
        ('{"trainable": {}}', "holds no config"),
        ('{"config": {}}', "not an adapter"),
    ],
)
def test_mistakes_end_in_one_clear_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "selection.png").exists()
