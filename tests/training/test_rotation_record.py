"""The record of a run whose layers trained in turn: what happened, and what is made of it."""

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from intaglio import IST, LISA, RST, S2FT, Full
from intaglio.cli import app
from intaglio.report.layers import plot_layers
from intaglio.runs.inspect import inspect
from intaglio.training.rotation_record import FILE, ranking, read, rows, to_csv
from support.layers import adapted, attached, run, stack

METHODS = {
    "ist": (IST(layers=2, interval=5), adapted),
    "rst": (RST(layers=0.5, policy="contiguous"), adapted),
    "lisa": (LISA(redraw=7), stack),
    "full": (IST(layers=3, interval=7, of=Full()), stack),
}


def trained(case, steps=30, layers=8):
    method, build = METHODS[case]
    model = build(layers)
    tuner = attached(model, method)
    seen = []
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for step in range(steps):
        seen.append(list(tuner.rotation.active))
        run(model, tuner, 1, start=step, optimizer=optimizer)
    return tuner, seen


def folder(path, tuner):
    """The folder of a run, as `intaglio train` leaves it."""
    path.mkdir(exist_ok=True)
    tuner.save(path / "adapter")
    tuner.rotation.recorder().save(path)
    (path / "run.json").write_text(json.dumps({"config": {}, "trainable": {"of": 100_000}}))
    return path


@pytest.mark.parametrize("case", METHODS)
def test_the_record_is_what_happened(tmp_path, case):
    """IST checklist 32: layers, visits, periods and draws are those that were seen at each update."""
    tuner, seen = trained(case)
    record = tuner.rotation.recorder().save(tmp_path)
    assert record == read(tmp_path / FILE)
    assert record["layers"] == [f"model.layers.{i}" for i in range(8)]  # names of the base, adapter or not
    assert record["method"] == tuner.rotation.method.to_dict()
    assert record["updates"] == 30
    assert record["visits"] == [sum(layer in active for active in seen) for layer in range(8)]
    assert record["trained"]["at"] == list(range(31))
    assert record["trained"]["share"] == [[float(layer in active) for layer in range(8)] for active in seen]
    assert all(seen[step] == active for step, active in record["draws"] if step < 30)
    if record["importance"] is None:
        assert not tuner.rotation.method.learns
        assert not record["learned"]
    else:
        assert record["importance"] == tuner.rotation.importance.tolist() == record["learned"][-1][1]
        interval = tuner.rotation.method.interval
        assert [step for step, _ in record["learned"]] == list(range(interval, 31, interval))


def test_a_long_run_stays_small(tmp_path):
    """At most 200 moments are kept; visits stay exact, and the periods add up to them."""
    model = adapted(3, r=1)
    tuner = attached(model, IST(layers=1, interval=1))
    run(model, tuner, 450)
    record = tuner.rotation.recorder().save(tmp_path)
    assert record == read(tmp_path / FILE)
    assert len(record["learned"]) == len(record["draws"]) == len(record["trained"]["share"]) == 200
    assert record["learned"][-1] == [450, record["importance"]]
    assert (record["draws"][0][0], record["draws"][-1][0]) == (0, 450)
    lengths = torch.tensor(record["trained"]["at"]).diff()
    assert lengths.sum() == record["updates"] == 450
    counted = (torch.tensor(record["trained"]["share"]) * lengths[:, None]).sum(0)
    torch.testing.assert_close(counted, torch.tensor(record["visits"], dtype=torch.float), atol=0.1, rtol=0)
    assert plot_layers(record, tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_the_record(tmp_path):
    tuner, _ = trained("ist")
    record = tuner.rotation.recorder().save(tmp_path)
    with to_csv(record, tmp_path / "layers.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["layer"] for row in table] == record["layers"]
    assert [float(row["importance"]) for row in table] == record["importance"]
    assert [int(row["visits"]) for row in table] == record["visits"]
    assert [float(row["share"]) for row in table] == [visits / 30 for visits in record["visits"]]
    order = sorted(table, key=lambda row: int(row["rank"]))
    assert [float(row["importance"]) for row in order] == sorted(record["importance"], reverse=True)
    assert [row["layer"] for row in order] == [record["layers"][layer] for layer in ranking(record)]


def test_where_nothing_is_learned_no_layer_is_first(tmp_path):
    tuner, _ = trained("rst", steps=3)
    record = tuner.rotation.recorder().save(tmp_path)
    with pytest.raises(ValueError, match="rst draws layers at random"):
        ranking(record)
    assert {row["rank"] for row in rows(record)} == {None}
    assert to_csv(record, tmp_path / "layers.csv").read_text().splitlines()[1].startswith("model.layers.0,,,")
    early, _ = trained("ist", steps=2)
    with pytest.raises(ValueError, match="no importance was learned yet"):
        ranking(early.rotation.recorder().save(tmp_path))


def test_a_run_that_has_not_begun_has_a_record_too(tmp_path):
    for case in METHODS:
        tuner, _ = trained(case, steps=0)
        record = tuner.rotation.recorder().save(tmp_path)
        assert record == read(tmp_path / FILE)
        assert record["updates"] == 0
        assert plot_layers(record, tmp_path / "layers.png").is_file()
        assert to_csv(record, tmp_path / "layers.csv").is_file()


DAMAGE = {
    "not JSON": lambda record: "{",
    "not a mapping": lambda record: "[1]",
    "visits is missing": lambda record: json.dumps({k: v for k, v in record.items() if k != "visits"}),
    "visits does not fit its 8 layers": lambda record: json.dumps(record | {"visits": record["visits"][:-1]}),
    "importance does not fit": lambda record: json.dumps(record | {"importance": [None] * 8}),
    "learned does not fit": lambda record: json.dumps(record | {"learned": [[5, [0.0] * 7]]}),
    "draws does not fit": lambda record: json.dumps(record | {"draws": [[0, [8]]]}),
    "trained does not fit": lambda record: json.dumps(record | {"trained": {"at": [0, 30], "share": [[1.0]]}}),
    "names no layers": lambda record: json.dumps(record | {"layers": []}),
}


def test_a_damaged_record_is_refused(tmp_path):
    assert read(tmp_path / FILE) is None
    tuner, _ = trained("ist", steps=6)
    record = tuner.rotation.recorder().save(tmp_path)
    for what, damage in DAMAGE.items():
        (tmp_path / FILE).write_text(damage(record))
        with pytest.raises(ValueError, match=rf"layers\.json: damaged, .*{what}"):
            read(tmp_path / FILE)


# pictures and inspect


@pytest.mark.parametrize("layers", [2, 8, 32, 60])
def test_the_picture_holds_any_number_of_layers(tmp_path, layers):
    for method in (IST(layers=1, interval=2), RST(layers=1)):
        model = adapted(layers, r=1)
        tuner = attached(model, method)
        run(model, tuner, 4)
        picture = plot_layers(tuner.rotation.recorder().save(tmp_path), tmp_path / "layers.png")
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_a_lora_run(tmp_path):
    """Its adapter is PEFT's own; without the record it is none that inspect knows."""
    tuner, _ = trained("ist")
    place = folder(tmp_path / "run", tuner)
    result = inspect(place)
    assert result["entries"] == tuner.selection.size
    assert result["share"] == tuner.selection.size / 100_000
    assert result["layers"]["rows"] == rows(read(place / FILE))
    assert {"layers.png", "layers.csv"} <= {p.name for p in place.iterdir()}
    done = CliRunner().invoke(app, ["inspect", str(place), "--output", str(tmp_path / "elsewhere")])
    assert done.exit_code == 0, done.output
    assert "layers by importance" in done.output
    assert "6 in " in done.output
    assert (tmp_path / "elsewhere/layers.png").is_file()
    with pytest.raises(ValueError, match="PEFT's own adapter"):
        inspect(place, other=place)
    (place / FILE).unlink()
    with pytest.raises(ValueError, match="not an Intaglio adapter"):
        inspect(place)


def test_inspect_shows_layers_beside_the_selection(tmp_path):
    model = stack()
    tuner = attached(model, RST(layers=2, of=S2FT(o=0.5, down=0.25)))
    run(model, tuner, 5)
    result = inspect(folder(tmp_path / "run", tuner))
    assert result["projections"]
    assert [row["visits"] for row in result["layers"]["rows"]] == tuner.rotation.visits
    assert {"layers.png", "layers.csv", "selection.png"} <= {p.name for p in (tmp_path / "run").iterdir()}
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert "layers by updates that trained them" in done.output
