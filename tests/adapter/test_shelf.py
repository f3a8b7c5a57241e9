"""One shelf under pool and server: names, bounds, users, and folders that are read again only as they were."""

import json
import os
import shutil
import threading

import pytest

from intaglio import AdapterPool, Delta
from intaglio.adapter.folder import CONFIG, WEIGHTS
from intaglio.adapter.shelf import AdapterError, AdapterInUse, DuplicateAdapter, Shelf, UnknownAdapter
from intaglio.adapter.source import Source
from intaglio.export.lora import to_lora
from intaglio.runtime.store import AdapterStore
from support import requests, tiny

NAME = "gqa_llama"


class Words(Shelf[str]):
    """Holds the content of a file; every letter is a byte, and equal letters are one tensor."""

    def __init__(self, **bounds):
        super().__init__(**bounds)
        self.reading = lambda: None

    def _read(self, folder):
        self.reading()
        return (folder / WEIGHTS).read_text()

    def _sizes(self, value):
        return dict.fromkeys(value, 1)

    def load(self, name, path):
        with self._reserved(name):
            source, value = self._open(name, path, self._read)
            self._put(name, value, source)

    def keep(self, name, value):
        with self._reserved(name):
            self._put(name, value, None)


@pytest.fixture
def folder(tmp_path):
    def make(word, config="{}"):
        (tmp_path / word).mkdir()
        (tmp_path / word / CONFIG).write_text(config)
        (tmp_path / word / WEIGHTS).write_text(word)
        return tmp_path / word

    return make


def rewrite(path, content):
    """In place, in the same tick of the clock: inode, size and time stay."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


# bounds


def test_what_was_used_longest_ago_is_dropped(folder):
    shelf = Words(capacity_bytes=4)
    for word in ("ab", "cd", "ef"):
        shelf.load(word, folder(word))
    assert (shelf.resident_bytes, shelf.loads, shelf.evictions) == (4, 3, 1)
    assert [shelf.fetch(word) for word in ("cd", "ab", "ab", "cd")] == ["cd", "ab", "ab", "cd"]  # "ab" took the place of "ef"
    assert (shelf.loads, shelf.evictions) == (4, 2)
    assert shelf.names == ["ab", "cd", "ef"]


def test_shared_tensors_count_once(folder):
    shelf = Words(capacity_bytes=4)
    for word in ("abc", "bcd", "dcb"):
        shelf.load(word, folder(word))
    assert (shelf.resident_bytes, shelf.evictions) == (4, 0)
    shelf.load("xa", folder("xa"))  # leaves room for no more than two letters
    assert (shelf.resident_bytes, shelf.evictions) == (2, 3)


def test_what_has_no_folder_is_never_dropped(folder):
    shelf = Words(capacity_bytes=4)
    shelf.keep("kept", "abc")
    shelf.load("d", folder("d"))
    shelf.load("e", folder("e"))
    assert (shelf.fetch("kept"), shelf.resident_bytes, shelf.evictions) == ("abc", 4, 1)
    for load in (lambda: shelf.load("xy", folder("xy")), lambda: shelf.keep("xy", "xy")):
        with pytest.raises(
            AdapterError, match=r"'xy': needs 2 bytes beside the 3 of adapters without a folder.*capacity_bytes=4"
        ):
            load()
    assert shelf.names == ["d", "e", "kept"]


def test_what_is_asked_for_is_not_dropped(folder):
    """However small the capacity has become."""
    shelf = Words()
    for word in ("abc", "def"):
        shelf.load(word, folder(word))
    shelf.capacity_bytes = 2
    assert shelf.fetch("abc") == "abc"
    assert shelf.resident_bytes == 3


def test_what_is_too_large_is_not_even_read(folder):
    shelf = Words(capacity_bytes=4)
    shelf.reading = lambda: pytest.fail("was read")
    with pytest.raises(AdapterError, match=r"'ababab': needs 6 bytes, more than capacity_bytes=4"):
        shelf.load("ababab", folder("ababab"))


@pytest.mark.parametrize("bounds", [{"capacity_bytes": 0}, {"capacity_bytes": True}, {"max_entries": -1}])
def test_bounds_are_positive(bounds):
    with pytest.raises(ValueError, match=f"{next(iter(bounds))}=.*give a number above 0"):
        Words(**bounds)


# names and threads


def test_nobody_waits_while_files_are_read(folder):
    """Meanwhile the name is taken, and counts among the entries."""
    shelf, started, go_on = Words(max_entries=2), threading.Event(), threading.Event()
    shelf.load("ab", folder("ab"))
    shelf.reading = lambda: (started.set(), go_on.wait(10))
    slow = folder("cd")
    thread = threading.Thread(target=shelf.load, args=("cd", slow))
    thread.start()
    assert started.wait(10)
    assert (shelf.fetch("ab"), shelf.names, shelf.resident_bytes) == ("ab", ["ab"], 2)
    shelf.acquire("ab")
    shelf.release("ab")
    with pytest.raises(DuplicateAdapter, match="'cd'"):
        shelf.load("cd", slow)
    with pytest.raises(AdapterError, match="max_entries=2"):
        shelf.load("ef", slow)
    with pytest.raises(UnknownAdapter, match="'cd': no such adapter; loaded are ab"):
        shelf.fetch("cd")
    go_on.set()
    thread.join(10)
    assert shelf.names == ["ab", "cd"]


def test_a_failed_load_frees_its_name(folder):
    shelf, path = Words(max_entries=1), folder("ab")
    shelf.reading = lambda: {}["missing"]
    with pytest.raises(AdapterError, match=r"^'ab': .*damaged \(KeyError\)"):
        shelf.load("ab", path)
    shelf.reading = lambda: None
    shelf.load("ab", path)


def test_two_that_read_at_once_get_the_same(folder):
    shelf = Words(capacity_bytes=2)
    for word in ("ab", "cd"):
        shelf.load(word, folder(word))
    both, found = threading.Barrier(2), []
    shelf.reading = lambda: both.wait(10)
    threads = [threading.Thread(target=lambda: found.append(shelf.fetch("ab"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found[0] is found[1]
    assert shelf.loads == 3


def test_what_was_unloaded_while_it_was_read_does_not_come_back(folder):
    shelf = Words(capacity_bytes=2)
    for word in ("ab", "cd"):
        shelf.load(word, folder(word))
    shelf.reading = lambda: shelf.unload("ab")
    assert shelf.fetch("ab") == "ab"
    assert shelf.names == ["cd"]
    assert shelf.resident_bytes == 2


def test_an_unload_in_vain_leaves_everything(folder):
    shelf = Words()
    shelf.load("ab", folder("ab"))
    shelf.acquire("ab")
    with pytest.raises(AdapterInUse, match="'ab': 1 requests"):
        shelf.unload("ab", wait=0.01)
    shelf.acquire("ab")  # it is no longer leaving
    for _ in range(2):
        shelf.release("ab")
    shelf.unload("ab")
    with pytest.raises(UnknownAdapter, match="loaded are none"):
        shelf.unload("ab")


def test_an_empty_shelf_is_true():
    """`store or AdapterStore(model)` takes the store that is there."""
    assert Words()


def test_a_long_list_of_names_is_cut():
    shelf = Words()
    for number in range(11):
        shelf.keep(f"a{number:02}", "a")
    with pytest.raises(UnknownAdapter, match=r"loaded are a00, .*a09 …$"):
        shelf.fetch("b")


# folders


def dropped(folder, config="{}"):
    """A shelf that has dropped the adapter of a folder, and the folder."""
    shelf, path = Words(capacity_bytes=2), folder("ab", config)
    shelf.load("ab", path)
    shelf.load("cd", folder("cd"))
    return shelf, path


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_of_the_same_size_time_and_inode_is_noticed(folder, file):
    shelf, path = dropped(folder, '{"lora_alpha": 1}')
    rewrite(path / file, (path / file).read_bytes()[:-2] + b"7}")
    with pytest.raises(AdapterError, match=r"'ab': was dropped from memory and cannot be read again .*has changed since"):
        shelf.fetch("ab")


def test_a_folder_restored_from_a_copy_is_the_same(folder, tmp_path):
    shelf, path = dropped(folder)
    shutil.copytree(path, tmp_path / "copy")
    shutil.rmtree(path)
    with pytest.raises(AdapterError, match="not an adapter folder"):
        shelf.fetch("ab")
    shutil.copytree(tmp_path / "copy", path)
    os.utime(path / WEIGHTS, (0, 0))
    assert shelf.fetch("ab") == "ab"


def test_a_folder_that_changes_while_it_is_read_is_refused(folder):
    shelf, path = dropped(folder)
    shelf.reading = lambda: rewrite(path / WEIGHTS, b"xy")
    for call in (lambda: shelf.fetch("ab"), lambda: shelf.load("new", path)):
        rewrite(path / WEIGHTS, b"ab")
        with pytest.raises(AdapterError, match="has changed since"):
            call()
    assert shelf.names == ["ab", "cd"]


def test_a_link_that_points_elsewhere_by_now_does_not_matter(folder, tmp_path):
    """What was loaded is read again."""
    (tmp_path / "current").symlink_to(folder("ab"))
    shelf = Words(capacity_bytes=2)
    shelf.load("link", tmp_path / "current")
    shelf.load("cd", folder("cd"))
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "cd")
    assert shelf.fetch("link") == "ab"


def test_the_config_of_our_folders_stands_for_the_weights(folder):
    """They are hashed once, by reading; all others by the stamp, whatever their config says."""
    ours, other = '{"peft_type": "INTAGLIO", "sha256": "1"}', '{"peft_type": "LORA", "sha256": "1"}'
    for config, same in ((ours, True), ('{"peft_type": "INTAGLIO", "sha256": null}', False), (other, False)):
        path = folder("ab", config)
        before = Source.of(path)
        rewrite(path / WEIGHTS, b"xy")
        assert (Source.of(path) == before) is same
        shutil.rmtree(path)


# pool and store


def pooled(folders):
    """A pool that has dropped the first of two adapters, and how it is asked for one."""
    pool = AdapterPool(tiny.build(NAME))
    pool.load("a0", folders["a0"])
    pool = AdapterPool(tiny.build(NAME), capacity_bytes=pool.nbytes * 3 // 2)
    for name, path in folders.items():
        pool.load(name, path)
    return pool, pool.use


def stored(folders):
    """The same of a store."""
    store = AdapterStore(tiny.build(NAME))
    for name, path in folders.items():
        store.load(name, path)
    store.capacity_bytes = store.resident_bytes - 1
    store.fetch("a1")
    return store, store.fetch


@pytest.mark.parametrize("open_", [pooled, stored])
def test_pool_and_store_behave_alike(tmp_path, open_):
    """The same names, and the same answers where an adapter was dropped and its folder has changed."""
    base = tiny.build(NAME)
    folders = {f"a{seed}": requests.columns(base, seed).save(tmp_path / f"a{seed}") for seed in range(2)}
    found, use = open_(folders)
    for name in ("_a", "a:b"):
        found.load(name, folders["a1"])
        found.unload(name)
    for name in ("", "-a", "a/b", ".a", 3):
        with pytest.raises(AdapterError, match="adapter name"):
            found.load(name, folders["a0"])
    with pytest.raises(DuplicateAdapter, match=r"^'a0': an adapter of this name is loaded"):
        found.load("a0", folders["a1"])
    for call in (use, found.unload):
        with pytest.raises(UnknownAdapter, match=r"^'b': no such adapter; loaded are a0, a1$"):
            call("b")
    weights = folders["a0"] / WEIGHTS
    content = weights.read_bytes()
    rewrite(weights, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AdapterError, match=r"'a0': was dropped .*SHA-256"):  # the config says what the weights were
        use("a0")
    config = folders["a0"] / CONFIG
    rewrite(config, config.read_bytes().replace(b'"drawn"', b'"DRAWN"'))
    with pytest.raises(AdapterError, match=r"'a0': was dropped .*has changed since"):
        use("a0")
    rewrite(weights, content)
    rewrite(config, config.read_bytes().replace(b'"DRAWN"', b'"drawn"'))
    use("a0")


def test_a_lora_with_another_scale_is_another_adapter(tmp_path):
    """Its weights are the same to the last bit, and so is the size of its config."""
    base = tiny.build(NAME)
    delta = requests.columns(base, 0)
    to_lora(delta, base, tmp_path / "lora")
    store = AdapterStore(base)
    store.load("lora", tmp_path / "lora")
    store.load("other", delta.save(tmp_path / "delta"))
    store.capacity_bytes = 1
    store.fetch("other")  # drops the LoRA
    config = tmp_path / "lora" / CONFIG
    alpha = json.loads(config.read_text())["lora_alpha"]
    changed = config.read_text().replace(f'"lora_alpha": {alpha}', f'"lora_alpha": {"9" * len(str(alpha))}')
    rewrite(config, changed.encode())
    with pytest.raises(AdapterError, match="has changed since"):
        store.fetch("lora")


def test_an_adapter_in_memory_costs_no_look_at_its_folder(tmp_path):
    base = tiny.build(NAME)
    store, pool = AdapterStore(base), AdapterPool(tiny.build(NAME))
    path = requests.columns(base, 0).save(tmp_path / "a")
    store.load("a", path)
    pool.load("a", path)
    shutil.rmtree(path)
    store.fetch("a")
    pool.use("a")


def test_a_load_reads_while_another_thread_holds_the_pool(tmp_path, monkeypatch):
    path = requests.columns(tiny.build(NAME), 0).save(tmp_path / "a")
    pool, read, plain = AdapterPool(tiny.build(NAME)), threading.Event(), Delta.load

    def load(folder):
        delta = plain(folder)
        read.set()
        return delta

    monkeypatch.setattr(Delta, "load", load)
    with pool.using(None):
        thread = threading.Thread(target=pool.load, args=("a", path))
        thread.start()
        assert read.wait(10)
        with pytest.raises(DuplicateAdapter):
            pool.load("a", path)
        assert pool.names == []
    thread.join(10)
    assert pool.names == ["a"]
