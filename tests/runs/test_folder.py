"""The folder of a run: an earlier run in it is refused, continued or removed, never mixed, and other files stay."""

from pathlib import Path

import pytest

from intaglio.runs import folder


@pytest.fixture
def run(tmp_path):
    """A folder with every file that a run leaves, and one of the user's own."""
    for name in folder.FILES:
        (tmp_path / name).write_text("{}")
    (tmp_path / folder.ADAPTER).unlink()
    for name in (folder.ADAPTER, "checkpoint-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_names_are_told_apart():
    assert len(set(folder.FILES)) == len(folder.FILES)


def test_an_earlier_run_is_refused_continued_or_removed_whole(run):
    for name in (*folder.FILES, "checkpoint-5"):
        assert run / name in folder.earlier(run)
    with pytest.raises(ValueError, match=r"already holds a run \(run.json\); --resume continues it, --overwrite replaces it"):
        folder.output_folder(str(run), "run.yaml")
    assert folder.output_folder(str(run), "run.yaml", resume=True) == run
    assert folder.output_folder(str(run), "run.yaml", overwrite=True) == run
    assert len(folder.earlier(run)) == len(folder.FILES) + 1, "nothing is removed before it must be"
    folder.remove_earlier(run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    assert folder.output_folder(str(run), "run.yaml") == run


def test_a_link_is_removed_and_not_what_it_points_to(run, tmp_path_factory):
    place = tmp_path_factory.mktemp("link")
    (place / folder.ADAPTER).symlink_to(run / folder.ADAPTER)
    folder.remove_earlier(place)
    assert not list(place.iterdir())
    assert (run / folder.ADAPTER / "file").exists()


def test_where_a_run_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder.output_folder(None, "recipes/demo.yaml") == Path("runs/demo")
    assert folder.output_folder(None, {"data": {}}) == Path("runs/run")
    Path("file").touch()
    with pytest.raises(ValueError, match=r"train.output_dir='file': is a file"):
        folder.output_folder("file", "demo.yaml")
    with pytest.raises(ValueError, match="contradict each other"):
        folder.output_folder("new", "demo.yaml", resume=True, overwrite=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        folder.output_folder("new", "demo.yaml")
