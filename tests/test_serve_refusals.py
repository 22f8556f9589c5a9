"""fastbert serve: what is refused, as OpenAI and TEI do it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import httpx

from tests.checkpoints import tiny_checkpoint
from tests.servers import LIMITS, LONG, Held, held, loaded, post, prompted_checkpoint, scored_checkpoint

Servers = dict[str, Held]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("models")
    prompted_checkpoint(folder / "tiny")
    for name, labels in (("judge", 1), ("sorter", 3)):
        scored_checkpoint(folder / name, labels)
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(held(loaded(str(folder / name)), LIMITS)) for name in ("tiny", "judge", "sorter")
        }


EMBEDDINGS: dict[str, Any] = {"model": "tiny", "input": "a"}
BAD_EMBEDDINGS = [
    ({}, "model is missing", "model"),
    ({"model": "tiny"}, "input is missing", "input"),
    ({"model": 3, "input": "a"}, "model must be a string, but is an integer", "model"),
    (EMBEDDINGS | {"input": []}, "input is empty", "input"),
    (EMBEDDINGS | {"input": [[]]}, "number 0 of input is empty", "input"),
    (EMBEDDINGS | {"input": 3}, "input must be a list of strings, but is an integer", "input"),
    (EMBEDDINGS | {"input": ["a", 3]}, "input must be strings, but number 1 is an integer", "input"),
    (EMBEDDINGS | {"input": [3, "a"]}, "input must be strings, or lists of token ids, but holds a string", "input"),
    (EMBEDDINGS | {"input": [True]}, "input must be strings, or lists of token ids, but holds a boolean", "input"),
    (EMBEDDINGS | {"input": [[3], 3]}, "input must be lists of token ids, but number 1 is an integer", "input"),
    (EMBEDDINGS | {"input": [3, 24]}, "number 0 has token ids that are not in [0, 24)", None),
    (EMBEDDINGS | {"input": [[3], [-1]]}, "number 1 has token ids that are not in [0, 24)", None),
    (EMBEDDINGS | {"input": [3] * 49}, "number 0 has 49 token ids, but the model takes 48", None),
    (EMBEDDINGS | {"input": ["a"] * 9}, "the request has 9 texts, but 8 are allowed", None),
    (EMBEDDINGS | {"dimensions": 33}, "dimensions must be in [1, 32], but is 33", "dimensions"),
    (EMBEDDINGS | {"dimensions": 0}, "dimensions must be in [1, 32], but is 0", "dimensions"),
    (EMBEDDINGS | {"dimensions": True}, "dimensions must be an integer, but is a boolean", "dimensions"),
    (EMBEDDINGS | {"encoding_format": "hex"}, "encoding_format must be float or base64, but is 'hex'", None),
    (EMBEDDINGS | {"truncate": 1}, "truncate must be a boolean, but is an integer", "truncate"),
    (EMBEDDINGS | {"normalise": True}, "unknown field 'normalise'; known are input, model", "normalise"),
    (EMBEDDINGS | {"prompt_name": "x"}, "the model has no prompt 'x'", None),
    (EMBEDDINGS | {"prompt_name": "query", "input": [3]}, "prompt_name is for texts", "prompt_name"),
    ([EMBEDDINGS], "the body must be a JSON object, but is a list", None),
]


@pytest.mark.parametrize(
    ("body", "message", "param"), BAD_EMBEDDINGS, ids=[message for _, message, _ in BAD_EMBEDDINGS]
)
def test_a_mistake_is_answered_as_openai_does(servers: Servers, body: object, message: str, param: str | None) -> None:
    response = post(servers["tiny"], "/v1/embeddings", body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "message"),
    [
        ("/embed", {"inputs": []}, 400, "Empty", "inputs is empty"),
        ("/embed", {"inputs": ["a"] * 9}, 413, "Validation", "the request has 9 texts, but 8 are allowed"),
        ("/embed", {"inputs": "a", "truncation_direction": "left"}, 422, "Validation", "truncation_direction must be"),
        ("/embed", {}, 422, "Validation", "inputs is missing"),
        ("/tokenize", {"inputs": [3]}, 422, "Validation", "inputs must be a string or a list of strings"),
        ("/tokenize", {"inputs": ["a"] * 9}, 413, "Validation", "the request has 9 texts, but 8 are allowed"),
        ("/rerank", {"query": "a", "texts": ["b"]}, 424, "Backend", "tiny is an embedder: ask /v1/embeddings, /embed"),
        ("/predict", {"inputs": "a"}, 424, "Backend", "tiny is an embedder: ask /v1/embeddings, /embed"),
        ("/nothing", {}, 404, "Validation", "no such path: POST /nothing"),
        ("/info", {}, 405, "Validation", "no such method: POST /info"),
    ],
)
def test_a_mistake_is_answered_as_tei_does(
    servers: Servers, path: str, body: object, status: int, kind: str, message: str
) -> None:
    response = post(servers["tiny"], path, body)
    assert (response.status_code, response.json()["error_type"]) == (status, kind)
    assert response.json()["error"].startswith(message)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/rerank", {"texts": ["b"]}, 422, "query is missing"),
        ("/rerank", {"query": "a"}, 422, "texts is missing"),
        ("/rerank", {"query": "a", "texts": []}, 400, "texts is empty"),
        ("/rerank", {"query": "a", "texts": "b"}, 422, "texts must be a list of strings, but is a string"),
        ("/rerank", {"query": ["a"], "texts": ["b"]}, 422, "query must be a string, but is a list"),
        ("/rerank", {"query": "a", "texts": ["b", None]}, 422, "texts must be strings, but number 1 is null"),
        ("/rerank", {"query": "a", "texts": ["b", LONG], "truncate": False}, 413, "1 of 2 texts has more than 48"),
        ("/predict", {"inputs": ["a", "b", "c"]}, 422, "inputs must be a string, a pair"),
        ("/predict", {"inputs": [["a"], "b"]}, 422, "inputs must be a string, a pair"),
        ("/predict", {"inputs": [["a", "b", "c"]]}, 422, "inputs must be a string, a pair"),
        ("/predict", {"inputs": [["a"], []]}, 400, "a text of inputs is empty"),
        ("/predict", {"inputs": {"a": "b"}}, 422, "inputs must be a string, a pair"),
        ("/embed", {"inputs": "a"}, 424, "judge is a reranker: ask /rerank, /predict"),
    ],
)
def test_a_mistake_about_scores(servers: Servers, path: str, body: object, status: int, message: str) -> None:
    response = post(servers["judge"], path, body)
    assert (response.status_code, response.json()["error"][: len(message)]) == (status, message)


def test_a_classifier_embeds_and_reranks_nothing(servers: Servers) -> None:
    response = post(servers["sorter"], "/v1/embeddings", {"model": "sorter", "input": "a"})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "sorter is a classifier: ask /predict")
    assert post(servers["sorter"], "/rerank", {"query": "a", "texts": ["b"]}).status_code == 424


@pytest.mark.parametrize("body", [b"", b"{", b'{"inputs": "\xff"}', b'{"inputs": "\\ud800"}', b"[" * 3000])
def test_what_is_no_json(servers: Servers, body: bytes) -> None:
    response = httpx.post(servers["tiny"].url + "/embed", content=body)
    assert (response.status_code, response.json()["error"][:20]) == (400, "the body is not JSON")


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body(servers: Servers, chunked: bool) -> None:
    body = b'{"inputs": "' + b"a " * 3000 + b'"}'
    content: Any = (body[i : i + 100] for i in range(0, len(body), 100)) if chunked else body
    response = httpx.post(servers["tiny"].url + "/embed", content=content)
    assert (response.status_code, response.json()["error"]) == (413, "the body has more than 4000 bytes")


def test_the_other_models_and_methods(servers: Servers) -> None:
    response = post(servers["tiny"], "/v1/embeddings", {"model": "gpt", "input": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert httpx.get(servers["tiny"].url + "/v1/models/gpt").status_code == 404
    response = httpx.get(servers["tiny"].url + "/v1/embeddings")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert httpx.get(servers["tiny"].url + "/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    with held(loaded(tiny_checkpoint(tmp_path / "tiny")), api_key="sesame") as server:
        for headers in ({}, {"Authorization": "Bearer Sesame"}, {"Authorization": "sesame"}):
            response = post(server, "/v1/embeddings", {"model": "tiny", "input": "a"}, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert httpx.get(server.url + "/info", headers=headers).status_code == 401
        good = {"Authorization": "Bearer sesame"}
        assert post(server, "/embed", {"inputs": "a"}, headers=good).status_code == 200
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/metrics").status_code == 200
