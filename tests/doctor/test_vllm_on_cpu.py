"""vLLM on a CPU: wrong without our plugin, which is off until a variable asks for it."""

import importlib.metadata

from support.doctor import SERVER, one, refused


def test_vllm_on_a_cpu_without_our_plugin_is_refused(shelf, plugin, monkeypatch):
    """Trap 5: requests for the base get the last slot's adapter."""
    assert not one("vllm", shelf / "plain", device="cpu")["refused"]
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu", version="0.33.0")  # where it stays out
    monkeypatch.setenv("INTAGLIO_VLLM", "0")
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu")
    monkeypatch.delenv("INTAGLIO_VLLM")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    reason = refused("vllm", shelf / "plain", device="cpu")
    assert "vllm#48421" in reason
    assert "start that with INTAGLIO_VLLM=1" in reason
    assert not one("vllm", shelf / "plain", device="gpu")["refused"]


def test_the_command_asks_for_the_plugin_where_it_is_needed(shelf, plugin, monkeypatch):
    """It is off by default, so that vLLM on a CPU has to be started with a variable, which stands before the command."""
    result = one("vllm", shelf / "plain", device="cpu")
    assert result["environment"] == {"INTAGLIO_VLLM": "1"}
    assert result["command"].startswith("INTAGLIO_VLLM=1 vllm serve ")
    assert not one("vllm", shelf / "plain", device="cpu", command=result["command"])["refused"]
    result = one("vllm", shelf / "plain", device="gpu")
    assert result["environment"] == {}
    assert result["command"].startswith("vllm serve ")
    monkeypatch.setenv("INTAGLIO_VLLM", "force")
    forced = one("vllm", shelf / "plain", device="cpu", version="0.33.0")
    assert forced["command"].startswith("INTAGLIO_VLLM=force vllm serve ")


def test_vllms_own_switch_of_plugins_counts(shelf, plugin, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "intaglio,other")
    assert one("vllm", shelf / "plain", device="cpu")["command"].startswith("VLLM_PLUGINS=intaglio,other vllm serve ")
    monkeypatch.setenv("VLLM_PLUGINS", "other")  # vLLM does not load ours then, whatever our variable says
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu")
    monkeypatch.setenv("INTAGLIO_VLLM", "1")
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu")


def test_a_server_that_runs_on_a_cpu_without_the_plugin_is_refused(shelf, base, plugin, monkeypatch):
    """What counts is the server's environment, not that of whoever asks."""
    server = SERVER.format(base=base[0])
    monkeypatch.setenv("INTAGLIO_VLLM", "1")
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu", command=server)
    for variable in ("INTAGLIO_VLLM=1", "VLLM_PLUGINS=intaglio"):
        assert not one("vllm", shelf / "plain", device="cpu", command=f"{variable} {server}")["refused"]
