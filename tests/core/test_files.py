"""Files and folders appear whole or not at all, with the permissions that a user would expect; damaged JSON is named."""

import os
import stat

import pytest

from intaglio.core import files
from intaglio.core.files import folder_beside, publish, read_mapping, write_whole


def saved(target, last=(), **contents):
    with folder_beside(target) as folder:
        for name, content in contents.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
            path.chmod(0o600)  # as safetensors leaves its files
        publish(folder, target, last)


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def renames(monkeypatch):
    """Every rename, as (from, to); `stop` lets the machine crash before that many more."""

    class Renames(list):
        stop = None

    found, plain = Renames(), os.replace

    def replace(source, target):
        if found.stop == len(found):
            raise KeyboardInterrupt
        found.append((str(source), str(target)))
        plain(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    return found


def test_a_new_folder_appears_by_one_rename(tmp_path, renames):
    saved(tmp_path / "deep/new", config="1", weights="2", inner__file="3")
    assert content(tmp_path / "deep/new") == {"config": "1", "weights": "2", "inner/file": "3"}
    assert [to for _, to in renames] == [str(tmp_path / "deep/new")]
    assert os.listdir(tmp_path / "deep") == ["new"]


def test_files_of_an_old_folder_are_replaced_in_order_and_others_stay(tmp_path, renames):
    saved(tmp_path / "a", config="old", weights="old", notes="mine")
    renames.clear()
    saved(tmp_path / "a", ("config", "done"), config="new", done="new", weights="new", inner__file="new")
    assert content(tmp_path / "a") == dict.fromkeys(("config", "done", "weights", "inner/file"), "new") | {"notes": "mine"}
    assert [to for _, to in renames] == [str(tmp_path / "a" / name) for name in ("inner/file", "weights", "config", "done")]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("stop", range(4))
def test_a_crash_between_files_leaves_the_old_config_or_a_whole_folder(tmp_path, renames, stop):
    """Every file is whole: the old one or the new one; the config is new only where all others are."""
    saved(tmp_path / "a", config="old", weights="old", card="old")
    renames.clear()
    renames.stop = stop
    try:
        saved(tmp_path / "a", ("config",), config="new", weights="new", card="new")
    except KeyboardInterrupt:
        assert stop < 3  # there are three files
    found = content(tmp_path / "a")
    assert list(found.values()).count("new") == stop
    assert (found["config"] == "new") is (stop == 3)
    assert os.listdir(tmp_path) == ["a"]


def test_a_block_that_fails_leaves_nothing_behind(tmp_path):
    def fail():
        with folder_beside(tmp_path / "a") as folder:
            (folder / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


def test_what_is_not_published_vanishes(tmp_path):
    """As where another process was faster."""
    with folder_beside(tmp_path / "a") as folder:
        (folder / "file").write_text("mine")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_that_the_user_gives_new_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        saved(tmp_path / "new", weights="1", inner__file="2")
        (tmp_path / "old").mkdir()
        saved(tmp_path / "old", weights="1")
        write_whole(tmp_path / "file", b"1")
    finally:
        os.umask(before)
    for path in (tmp_path / "new", tmp_path / "new/inner"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
    for path in (tmp_path / "new/weights", tmp_path / "new/inner/file", tmp_path / "old/weights", tmp_path / "file"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.skipif(os.name == "nt", reason="another user's eyes")
def test_nobody_else_looks_into_what_is_not_finished(tmp_path):
    with folder_beside(tmp_path / "a") as folder:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        assert folder.parent.name.startswith(".a.")


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_next(tmp_path, renames, monkeypatch):
    """What a crash of the machine can leave follows from the order of fsync and rename."""
    events = []
    monkeypatch.setattr(files, "_sync", lambda path: events.append(("sync", path.name)))
    plain = files.os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append(("rename", b.name)), plain(a, b)))
    saved(tmp_path / "a", ("config",), config="1", weights="2")
    assert events[-3:] == [("sync", "a"), ("rename", "a"), ("sync", tmp_path.name)]
    assert {("sync", "config"), ("sync", "weights")} == set(events[:-3])
    events.clear()
    saved(tmp_path / "a", ("config",), config="1", weights="2")
    assert events[2:] == [("rename", "weights"), ("sync", "a"), ("rename", "config"), ("sync", "a")]
    assert {("sync", "config"), ("sync", "weights")} == set(events[:2])


def test_folders_that_cannot_be_synced_do_no_harm(tmp_path, monkeypatch):
    plain = os.open

    def no_folders(path, *args, **kwargs):
        if os.path.isdir(path) and not args[0] & getattr(os, "O_DIRECTORY", 0):
            raise PermissionError(path)
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(files.os, "open", no_folders)
    write_whole(tmp_path / "file", b"1")
    assert (tmp_path / "file").read_bytes() == b"1"


def test_a_file_is_written_whole_or_stays(tmp_path, renames):
    write_whole(tmp_path / "deep/file", b"old")
    renames.stop = len(renames)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "deep/file", b"new")
    assert (tmp_path / "deep/file").read_bytes() == b"old"
    assert os.listdir(tmp_path / "deep") == ["file"]


DAMAGED = {
    "half": (b'{"a": ', "not JSON"),
    "empty": (b"", "not JSON"),
    "nested": (b"[" * 100_000, "not JSON"),
    "nested mapping": (b'{"a": ' * 100_000, "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not JSON"),
    "a number too long": (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    "a list": (b"[1]", "not a mapping"),
    "null": (b"null", "not a mapping"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_json_is_refused_by_name(tmp_path, damage):
    raw, message = DAMAGED[damage]
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"config\.json: damaged, {message}"):
        read_mapping(tmp_path / "config.json")


def test_a_mapping_is_read_and_a_missing_file_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"ä": [1, null]}', encoding="utf-8")
    assert read_mapping(tmp_path / "config.json") == {"ä": [1, None]}
    with pytest.raises(FileNotFoundError):
        read_mapping(tmp_path / "other.json")
