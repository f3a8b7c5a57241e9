"""Random traffic against the real server: no wrong adapter, nothing left over. `benchmarks/serve_soak.py` is the long one."""

import shutil

from intaglio.serve.limits import Limits
from support import serving
from support.serving import Twin, make_adapter, running, wait_until
from support.traffic import Traffic, right_answers

PROMPTS = ["Common beginning of every prompt, long enough for a shared page. " + end for end in ("One", "Two", "Three")]


def test_random_traffic(tmp_path):
    base = serving.folder(tmp_path / "base")
    twin = Twin(base)
    folders = {f"f{seed}": make_adapter(twin.model, tmp_path / f"root/f{seed}", seed) for seed in range(4)}
    shutil.copytree(folders["f0"], tmp_path / "root/damaged")
    (tmp_path / "root/damaged/adapter_model.safetensors").write_bytes(b"damaged")
    texts = right_answers(twin, folders, PROMPTS)
    assert len({texts[name, 0][12] for name in ["", *folders]}) == 5  # each has a voice of its own
    size = (folders["f0"] / "adapter_model.safetensors").stat().st_size
    limits = Limits(max_running=8, max_queue=4, unload_wait=0.05)
    with running(base, tmp_path / "root", limits=limits, keys=["k"], capacity=3 * size, name="base") as server:
        traffic = Traffic(server.url, texts, PROMPTS, ["n0", "n1", "n2", "n3", "n4"], key="k")
        report = traffic.run(400, callers=14)
        service = server.service
        wait_until(lambda: service.admission.taken == service.engine.running == service.engine.waiting == 0)
        assert service.healthy
        names = {info.name for info in service.store.infos()}
        for name in names:
            service.store.unload(name)  # nobody holds one any more
        series = {
            sample.labels["model"]
            for metric in service.metrics.registry.collect()
            for sample in metric.samples
            if sample.labels.get("model")
        }
        assert series <= names | {"base"}
    assert report.faults == []
    assert report.right > 60
    seen = {status for _, status in report.statuses}
    assert seen >= {200, 400, 401, 404, 499}, report.statuses
