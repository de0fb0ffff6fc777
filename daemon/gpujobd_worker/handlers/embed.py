"""`embed`: one vector a text, from any BERT-like model in a local folder (config.json, tokenizer, model.safetensors).

    {"text": "a chess program"}
        -> {"embedding": "<base64 of dim x float32, little-endian>", "dim": 384}
        -> {"embedding": [0.0123, ...], "dim": 384}                              with the job parameter encoding=float

An item may also be a line of an OpenAI batch; then the output is that of OpenAI, save for the custom_id, which stands
in the record beside it. Ids are made from the content, so that a job run twice gives the same bytes.

    {"custom_id": "a7", "method": "POST", "url": "/v1/embeddings", "body": {"input": "..." or ["...", ...],
     "model": "...", "encoding_format": "float" (default) or "base64", "dimensions": 128}}
        -> {"id": "batch_req_...", "response": {"status_code": 200, "request_id": "req_...", "body":
            {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [...]}, ...],
             "model": "all-MiniLM-L6-v2", "usage": {"prompt_tokens": 7, "total_tokens": 7}}}, "error": null}

Vector: mean of the last layer over the text's tokens (Reimers & Gurevych 2019, section 3), scaled to length 1 unless
the job says normalize=false. Texts over `max_tokens` are cut, as sentence-transformers does. `dimensions` keeps the
first so many numbers and scales again. Floats are rounded to 7 decimals: float32 holds no more, and 17 digits double
the size. Batched and alone, the same text agrees to about 1e-6, not to the bit.

Administrator's parameters: model (folder), max_tokens (256), dtype ("float32", "bfloat16", "float16").
Job parameters: normalize (bool, true), encoding ("base64" or "float").
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

URL = "/v1/embeddings"
INPUTS_MAX = 2048  # texts in one line of an OpenAI batch, as there
FORWARD_TOKENS_MAX = 16_384  # padded tokens in one pass of the model; a longer text than that goes alone
ENCODINGS = ("base64", "float")
DECIMALS = 7


class Request(NamedTuple):
    """What an item asks for."""

    texts: list[str]
    encoding: str  # "": the job's
    dimensions: int  # 0: all
    openai: bool


class Embed:
    def __init__(self, *, device: str, model: str, max_tokens: int = 256, dtype: str = "float32") -> None:
        """Load the model; nothing is fetched, no code from its folder is run, no pickle is read."""
        self.device = torch.device(device)
        self.name = os.path.basename(os.path.normpath(model))
        self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        encoder = AutoModel.from_pretrained(model, local_files_only=True, use_safetensors=True)
        self.model = encoder.to(device=self.device, dtype=_dtype(dtype)).eval()
        self.dim = int(self.model.config.hidden_size)
        self.max_tokens = max_tokens
        tokens_limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        if not 2 < max_tokens <= tokens_limit:
            raise ValueError(f"max_tokens is {max_tokens}, this model allows 3 to {tokens_limit}")

    def check(self, item: dict[str, Any]) -> None:
        """Raises: ValueError saying what is wrong with the item."""
        request = _request(item)
        if request.dimensions > self.dim:
            raise ValueError(f"dimensions is {request.dimensions}, the model has {self.dim}")

    def __call__(
        self, batch: list[dict[str, Any]], *, normalize: bool = True, encoding: str = "base64"
    ) -> list[dict[str, Any] | Exception]:
        """One output an item, in order; an exception in the place of an item whose vector is not finite."""
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding is {encoding!r}, known are {', '.join(ENCODINGS)}")
        requests = [_request(item) for item in batch]
        texts = [text for request in requests for text in request.texts]
        vectors, tokens = self.embed(texts)
        outputs: list[dict[str, Any] | Exception] = []
        at = 0
        for item, request in zip(batch, requests):
            until = at + len(request.texts)
            mine = _finish(vectors[at:until], request.dimensions, normalize)
            if not bool(torch.isfinite(mine).all()):
                outputs.append(
                    FloatingPointError(f"the model's vector is not finite (dtype {self.model.dtype})")
                )
            elif request.openai:
                outputs.append(_openai_output(item, request, mine, sum(tokens[at:until]), self.name))
            else:
                (embedding,) = _encoded(mine, encoding)
                outputs.append({"embedding": embedding, "dim": mine.shape[1]})
            at = until
        return outputs

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
        """Mean-pooled vectors, float32[texts, dim] on the CPU, and tokens per text; both in the order of `texts`.

        Inside, texts go by length, so that little is padded: +22 % on two CPU cores.
        """
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)
        tokens = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(texts)), key=tokens.__getitem__)
        vectors = torch.empty(len(texts), self.dim)
        for places in _forwards(order, tokens):
            vectors[places] = self._forward(encoded, places).cpu()
        return vectors, tokens

    def _forward(self, encoded: Any, places: list[int]) -> torch.Tensor:
        """float32[len(places), dim] on the model's device."""
        inputs = {
            name: pad_sequence(
                [torch.tensor(rows[place]) for place in places],
                batch_first=True,
                padding_value=(self.tokenizer.pad_token_id or 0) if name == "input_ids" else 0,
            ).to(self.device)
            for name, rows in encoded.items()
        }
        hidden = self.model(**inputs).last_hidden_state.float()  # [texts, tokens, dim]
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        mean: torch.Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return mean


def _dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"dtype is {name!r}, known are {', '.join(dtypes)}")
    return dtypes[name]


def _forwards(order: list[int], tokens: list[int]) -> list[list[int]]:
    """Cut `order`, shortest first, into passes of at most FORWARD_TOKENS_MAX padded tokens."""
    passes: list[list[int]] = [[]]
    for place in order:
        if passes[-1] and (len(passes[-1]) + 1) * tokens[place] > FORWARD_TOKENS_MAX:
            passes.append([])
        passes[-1].append(place)
    return passes


def _finish(vectors: torch.Tensor, dimensions: int, normalize: bool) -> torch.Tensor:
    if dimensions:
        vectors = vectors[:, :dimensions]
    return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors


def _encoded(vectors: torch.Tensor, encoding: str) -> list[str] | list[list[float]]:
    if encoding == "base64":
        return [base64.b64encode(row.numpy().astype("<f4").tobytes()).decode() for row in vectors]
    rounded: list[list[float]] = torch.round(vectors.double(), decimals=DECIMALS).tolist()
    return rounded


# --- what an item may look like -------------------------------------------------------------------------------


def _request(item: dict[str, Any]) -> Request:
    """Raises: ValueError."""
    if "body" in item or "url" in item:
        return _openai_request(item)
    return Request([_text(item.get("text"), "text")], "", 0, openai=False)


def _openai_request(item: dict[str, Any]) -> Request:
    body = item.get("body")
    if item.get("url") != URL:
        raise ValueError(f"url is {item.get('url')!r}, this handler serves {URL}")
    if item.get("method", "POST") != "POST":
        raise ValueError(f"method is {item['method']!r}, not POST")
    if not isinstance(body, dict):
        raise ValueError("body is not an object")  # noqa: TRY004 - checks answer with ValueError
    if not isinstance(body.get("model", ""), str):
        raise ValueError("body.model is not a string")  # noqa: TRY004 - checks answer with ValueError
    encoding = body.get("encoding_format", "float")
    if encoding not in ENCODINGS:
        raise ValueError(f"body.encoding_format is {encoding!r}, known are {', '.join(ENCODINGS)}")
    dimensions = body.get("dimensions", 0)
    if type(dimensions) is not int or (dimensions < 1 and "dimensions" in body):
        raise ValueError(f"body.dimensions is {dimensions!r}, not a number of 1 or more")
    return Request(_texts(body.get("input")), encoding, dimensions, openai=True)


def _texts(given: Any) -> list[str]:
    if not isinstance(given, list):
        return [_text(given, "body.input")]
    if not 0 < len(given) <= INPUTS_MAX:
        raise ValueError(f"body.input has {len(given)} texts, allowed are 1 to {INPUTS_MAX}")
    return [_text(text, f"body.input[{index}]") for index, text in enumerate(given)]


def _text(given: Any, name: str) -> str:
    if given is None:
        raise ValueError(f"{name} is missing")
    if not isinstance(given, str):
        raise ValueError(f"{name} is {type(given).__name__}, not a string")  # noqa: TRY004 - checks answer with ValueError
    if not given.strip():
        raise ValueError(f"{name} is empty")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a surrogate pair, which is no character") from None
    return given


def _openai_output(
    item: dict[str, Any], request: Request, vectors: torch.Tensor, tokens: int, model: str
) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()
    data = [
        {"object": "embedding", "index": index, "embedding": embedding}
        for index, embedding in enumerate(_encoded(vectors, request.encoding))
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": model, "usage": usage}
    response = {"status_code": 200, "request_id": f"req_{digest[32:56]}", "body": body}
    return {"id": f"batch_req_{digest[:24]}", "response": response, "error": None}
