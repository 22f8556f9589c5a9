"""fastbert serve: what is answered, to one client and to many."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import httpx
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from fastbert import cli
from fastbert.errors import InputError
from fastbert.inference.embedder import Embedder
from fastbert.inference.server.run import bound
from tests.checkpoints import TEXTS
from tests.servers import (
    LIMITS,
    LONG,
    PATIENCE,
    Held,
    assert_near,
    held,
    loaded,
    post,
    prompted_checkpoint,
    scored_checkpoint,
    unit,
    until,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prompted_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def embedder(checkpoint: str) -> Embedder:
    return Embedder.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def served(checkpoint: str) -> Iterator[Held]:
    with held(loaded(checkpoint, batch_tokens=40), LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Held, str]]:
    checkpoint = scored_checkpoint(tmp_path_factory.mktemp("models") / "judge", 1)
    with held(loaded(checkpoint), LIMITS) as server:
        yield server, checkpoint


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Held, str]]:
    checkpoint = scored_checkpoint(tmp_path_factory.mktemp("models") / "sorter", 3)
    with held(loaded(checkpoint), LIMITS) as server:
        yield server, checkpoint


@torch.no_grad()
def stock_logits(checkpoint: str, *texts: list[str]) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return model(**tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")).logits  # type: ignore[no-any-return]


# What is answered


def test_embed_is_of_length_1_unless_told_otherwise(served: Held, embedder: Embedder) -> None:
    expected = embedder.encode(TEXTS)
    assert_near(post(served, "/embed", {"inputs": TEXTS}).json(), unit(expected))
    assert_near(post(served, "/embed", {"inputs": TEXTS, "normalize": False}).json(), expected)
    assert_near(post(served, "/embed", {"inputs": "a dog"}).json(), unit(embedder.encode(["a dog"])))
    short = post(served, "/embed", {"inputs": TEXTS, "dimensions": 5}).json()
    assert_near(short, unit(expected[:, :5]))


def test_embed_with_a_prompt_of_the_model(served: Held, embedder: Embedder) -> None:
    """Its tokens take no part in the vector, in a batch with texts that have none."""
    served.gate.shut()
    first = served.in_thread("/embed", {"inputs": "a"})
    assert served.gate.entered.wait(PATIENCE)
    asking = [served.in_thread("/embed", {"inputs": ["a dog"], "prompt_name": name}) for name in ("query", None)]
    served.until_waiting(2)
    served.gate.opened.set()
    for thread, prompt in zip([*asking, first], ["query", None, None], strict=True):
        thread.join(PATIENCE)
        expected = embedder.encode(["a" if thread is first else "a dog"], prompt=prompt)
        assert_near(thread.response.json(), unit(expected))


def test_ids_are_taken_as_they_are(served: Held, embedder: Embedder) -> None:
    ids = embedder.tokenizer(TEXTS)["input_ids"]
    assert_near(post(served, "/embed", {"inputs": ids}).json(), unit(embedder.encode(TEXTS)))
    assert_near(post(served, "/embed", {"inputs": ids[0]}).json(), unit(embedder.encode(TEXTS[:1])))


def test_what_is_too_long_is_cut_or_refused(served: Held, embedder: Embedder) -> None:
    before = served.metric("cut_texts_total")
    assert_near(post(served, "/embed", {"inputs": [LONG, "a"]}).json(), unit(embedder.encode([LONG, "a"])))
    assert served.metric("cut_texts_total") == before + 1
    refused = post(served, "/embed", {"inputs": [LONG, "a"], "truncate": False})
    message = "1 of 2 texts has more than 48 tokens"
    assert (refused.status_code, refused.json()) == (413, {"error": message, "error_type": "Validation"})
    refused = post(served, "/v1/embeddings", {"model": "tiny", "input": [LONG, "a"], "truncate": False})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert post(served, "/embed", {"inputs": ["a", "the cat"], "truncate": False}).status_code == 200


def test_tokenize_says_where_tokens_stand(served: Held) -> None:
    (tokens,) = post(served, "/tokenize", {"inputs": "a cats"}).json()
    assert [t["text"] for t in tokens] == ["[CLS]", "a", "cat", "##s", "[SEP]"]
    assert tokens[0] == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert (tokens[3]["start"], tokens[3]["stop"], tokens[3]["special"]) == (5, 6, False)
    plain = post(served, "/tokenize", {"inputs": ["a", "dog"], "add_special_tokens": False}).json()
    assert [[t["text"] for t in row] for row in plain] == [["a"], ["dog"]]


def test_info(served: Held, classifier: tuple[Held, str]) -> None:
    about = httpx.get(served.url + "/info").json()
    assert about["model_id"] == "tiny"
    assert about["model_type"] == {"embedding": {"dimensions": 32}}
    assert (about["max_input_length"], about["max_batch_tokens"], about["max_client_batch_size"]) == (48, 40, 8)
    names = {"0": "label 0", "1": "label 1", "2": "label 2"}
    assert httpx.get(classifier[0].url + "/info").json()["model_type"] == {"classifier": {"id2label": names}}


@pytest.mark.parametrize("raw", [False, True])
def test_rerank_gives_the_best_first(reranker: tuple[Held, str], raw: bool) -> None:
    server, checkpoint = reranker
    logits = stock_logits(checkpoint, ["a cat"] * 5, TEXTS)[:, 0]
    expected = logits if raw else logits.sigmoid()
    body = {"query": "a cat", "texts": TEXTS, "raw_scores": raw, "return_text": True}
    ranked = post(server, "/rerank", body).json()
    assert [r["index"] for r in ranked] == expected.argsort(descending=True).tolist()
    assert [r["text"] for r in ranked] == [TEXTS[r["index"]] for r in ranked]
    assert_near([r["score"] for r in ranked], expected.sort(descending=True).values)
    assert "text" not in post(server, "/rerank", {"query": "a cat", "texts": TEXTS}).json()[0]


def test_rerank_gives_equal_scores_in_their_order(reranker: tuple[Held, str]) -> None:
    ranked = post(reranker[0], "/rerank", {"query": "a cat", "texts": ["a dog"] * 5}).json()
    assert [r["index"] for r in ranked] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("raw", [False, True])
def test_predict_takes_texts_and_pairs(classifier: tuple[Held, str], raw: bool) -> None:
    server, checkpoint = classifier
    texts, pairs = stock_logits(checkpoint, TEXTS), stock_logits(checkpoint, ["a cat"] * 2, ["a dog", "the mat"])
    rows = [*([text] for text in TEXTS), ["a cat", "a dog"], ["a cat", "the mat"]]
    logits = torch.cat([texts, pairs])
    expected = logits if raw else logits.softmax(-1)
    predicted = post(server, "/predict", {"inputs": rows, "raw_scores": raw}).json()
    one = [post(server, "/predict", {"inputs": item, "raw_scores": raw}).json() for item in (TEXTS[0], rows[5])]
    for labels, scores in zip([*predicted, *one], torch.cat([expected, expected[[0, 5]]]), strict=True):
        order = scores.argsort(descending=True)
        assert [one["label"] for one in labels] == [f"label {i}" for i in order]
        assert_near([one["score"] for one in labels], scores[order])


def test_predict_scores_as_the_checkpoint_says(reranker: tuple[Held, str], tmp_path: Path) -> None:
    server, checkpoint = reranker
    ((one,),) = post(server, "/predict", {"inputs": [["a cat", "a dog"]]}).json()
    assert_near(one["score"], stock_logits(checkpoint, ["a cat"], ["a dog"]).sigmoid()[0, 0])
    checkpoint = scored_checkpoint(tmp_path, 3, problem_type="multi_label_classification")
    with held(loaded(checkpoint)) as several:
        labels = post(several, "/predict", {"inputs": "a cat"}).json()
    expected = stock_logits(checkpoint, ["a cat"]).sigmoid()[0].sort(descending=True).values
    assert_near([label["score"] for label in labels], expected)


# Many clients


def test_beyond_the_queue_a_request_is_turned_away(served: Held) -> None:
    served.gate.shut()
    accepted = [served.in_thread("/embed", {"inputs": ["a dog"] * 6}) for _ in range(2)]
    until(lambda: served.metric("queue_texts") == 12)
    refused = post(served, "/v1/embeddings", {"model": "tiny", "input": "a"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    refused = post(served, "/embed", {"inputs": "a"})
    assert (refused.status_code, refused.json()["error_type"]) == (429, "Overloaded")
    served.gate.opened.set()
    for thread in accepted:
        thread.join(PATIENCE)
        assert thread.response.status_code == 200
    assert post(served, "/embed", {"inputs": "a"}).status_code == 200
    assert served.metric("queue_texts") == 0


CLIENT = """
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1] + "/embed", b'{"inputs": ["a bird sang", "a tree"]}'))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_client_that_goes_away_takes_its_texts_along(served: Held, embedder: Embedder, killed: bool) -> None:
    served.gate.shut()
    disconnects = served.metric("disconnects_total")
    first = served.in_thread("/embed", {"inputs": ["a dog"]})
    assert served.gate.entered.wait(PATIENCE)
    if killed:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, served.url])
        until(lambda: served.metric("queue_texts") == 3)
        client.kill()
        client.wait()
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(served.url + "/embed", json={"inputs": ["a bird sang", "a tree"]}, timeout=0.3)
    until(lambda: served.metric("queue_texts") == 1)
    assert served.metric("disconnects_total") == disconnects + 1
    other = served.in_thread("/embed", {"inputs": ["the mat"]})
    until(lambda: served.metric("queue_texts") == 2)
    served.gate.opened.set()
    for thread, text in ((first, "a dog"), (other, "the mat")):
        thread.join(PATIENCE)
        assert_near(thread.response.json(), unit(embedder.encode([text])))
    assert [len(batch.lengths) for batch in served.gate.batches] == [1, 1]


@pytest.mark.parametrize(
    ("query", "batches"),
    [
        ("a dog ran", [[3], [8, 8, 5, 8, 8], [8, 8, 8, 8]]),
        ("cat " * 28, [[3], [8, 8], [30, 8], [8, 8, 8, 8, 8]]),  # what has no room begins the next batch
    ],
)
def test_requests_take_turns(served: Held, embedder: Embedder, query: str, batches: list[list[int]]) -> None:
    """Of a batch of 40 tokens a query gets its share, whatever came before it; a batch has no more."""
    texts = ["the cat sat on the mat"] * 8  # of 8 tokens
    served.gate.shut()
    first = served.in_thread("/embed", {"inputs": "a"})
    assert served.gate.entered.wait(PATIENCE)
    many = served.in_thread("/embed", {"inputs": texts})
    served.until_waiting(1)
    short = served.in_thread("/embed", {"inputs": [query]})
    served.until_waiting(2)
    served.gate.opened.set()
    for thread in (first, many, short):
        thread.join(PATIENCE)
    assert_near(many.response.json(), unit(embedder.encode(texts)))
    assert_near(short.response.json(), unit(embedder.encode([query])))
    assert [batch.lengths.tolist() for batch in served.gate.batches] == batches


def test_what_the_model_cannot_take_fails_alone(
    served: Held, embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = embedder.tokenizer.convert_tokens_to_ids("bird")
    served.gate.shut()
    served.gate.poison = poison
    first = served.in_thread("/embed", {"inputs": "a"})
    assert served.gate.entered.wait(PATIENCE)
    good = served.in_thread("/embed", {"inputs": ["a dog"]})
    bad = served.in_thread("/embed", {"inputs": ["a bird"]})
    served.until_waiting(2)
    served.gate.opened.set()
    for thread in (first, good, bad):
        thread.join(PATIENCE)
    assert_near(good.response.json(), unit(embedder.encode(["a dog"])))
    assert bad.response.status_code == 500
    assert bad.response.json() == {"error": "the model failed; the server's log says why", "error_type": "Backend"}
    assert "RuntimeError: poisoned" in capsys.readouterr().err
    assert post(served, "/v1/embeddings", {"model": "tiny", "input": ["bird"]}).status_code == 500
    served.gate.poison = embedder.tokenizer.cls_token_id  # all
    assert httpx.get(served.url + "/health").status_code == 503
    served.gate.poison = None
    assert httpx.get(served.url + "/health").status_code == 200


def test_what_is_not_finite_is_no_answer(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with held(loaded(checkpoint)) as server:
        server.gate.run = lambda tokens: np.full((len(tokens.lengths), 32), np.nan, np.float32)
        assert post(server, "/embed", {"inputs": "a"}).status_code == 500
    assert "the model gave values that are not finite" in capsys.readouterr().err


def test_a_server_that_stops_turns_new_requests_away(checkpoint: str) -> None:
    with held(loaded(checkpoint)) as server:
        server.gate.shut()
        accepted = server.in_thread("/embed", {"inputs": "a"})
        assert server.gate.entered.wait(PATIENCE)
        server.service.closing = True
        response = post(server, "/v1/embeddings", {"model": "tiny", "input": "a"})
        assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
        assert post(server, "/embed", {"inputs": "a"}).json()["error_type"] == "Unhealthy"
        assert httpx.get(server.url + "/health").status_code == 503
        server.gate.opened.set()
        accepted.join(PATIENCE)
        assert accepted.response.status_code == 200


def test_a_server_waits_for_its_model_no_longer_than_it_may(checkpoint: str) -> None:
    with held(loaded(checkpoint)) as server:
        server.gate.shut()
        accepted = server.in_thread("/embed", {"inputs": "a"})
        assert server.gate.entered.wait(PATIENCE)
        server.server.config.timeout_graceful_shutdown = 0
        server.server.should_exit = True
        accepted.join(PATIENCE)
        assert accepted.response.status_code == 503
        assert accepted.response.json() == {"error": "the server has stopped", "error_type": "Unhealthy"}


def test_metrics_are_prometheus_and_count_what_was_done(checkpoint: str, embedder: Embedder) -> None:
    with held(loaded(checkpoint)) as server:
        before = server.metric("texts_total"), server.metric("tokens_total")
        post(server, "/embed", {"inputs": TEXTS})
        post(server, "/embed", {"inputs": []})
        page = httpx.get(server.url + "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }
    assert samples["fastbert_requests_total", "/embed", "200"] == 1
    assert samples["fastbert_requests_total", "/embed", "400"] == 1
    assert samples["fastbert_request_seconds_count", "/embed"] == 2
    assert samples["fastbert_texts_total",] - before[0] == 5
    assert samples["fastbert_tokens_total",] - before[1] == len(embedder.tokenize(TEXTS).ids)
    assert samples["fastbert_batch_texts_sum",] == samples["fastbert_texts_total",]
    assert samples["fastbert_batch_tokens_sum",] == samples["fastbert_tokens_total",]
    assert samples["fastbert_queue_texts",] == 0


# The command


def test_the_command_says_in_a_line_what_is_wrong(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*arguments: object) -> Exception | None:
        return CliRunner().invoke(cli.app, ["serve", *map(str, arguments)]).exception  # type: ignore[return-value]

    with bound("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        taken = error(checkpoint, "--port", port)
    assert isinstance(taken, InputError)
    assert str(taken) == f"cannot listen on 127.0.0.1, port {port}: Address already in use"
    assert str(error(checkpoint, "--host", "no.such.host.invalid")).startswith("cannot listen on no.such.host.invalid")
    assert str(error(checkpoint, "--max-queue", 3)) == "a request of 2048 texts never has room in a queue of 3"
    assert str(error(f"{checkpoint}/nothing/at/all", "--port", 0)).startswith(f"{checkpoint}/nothing/at/all")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert str(error(checkpoint)).startswith("to serve a model, install orjson and prometheus_client and starlette")


def test_threads_end_with_their_server(checkpoint: str) -> None:
    before = threading.active_count()
    with held(loaded(checkpoint)) as server:
        post(server, "/embed", {"inputs": "a"})
        assert threading.active_count() > before
    until(lambda: threading.active_count() == before)
