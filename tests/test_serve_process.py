"""fastbert serve in a process of its own, with OpenAI's client, under a load, and stopped."""

import base64
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest

pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

# ruff: noqa: E402
import httpx

from fastbert.inference.embedder import Embedder
from tests.checkpoints import TEXTS, WORDS, tiny_checkpoint
from tests.servers import PATIENCE, Process, assert_near, process, until

MANY = [" ".join(Random(i).choices(WORDS[:17], k=1 + i % 40)) for i in range(400)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def embedder(checkpoint: str) -> Embedder:
    return Embedder.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint: str) -> Iterator[Process]:
    with process(checkpoint, "--batch-tokens", "200", "--api-key", "sesame") as server:
        yield server
        status, err = server.stop(signal.SIGINT)  # Ctrl-C
    assert status == 0
    assert err.count("\n") == 1
    assert err.startswith("fastbert: stopped after ")


@pytest.fixture(scope="module")
def client(server: Process) -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0, timeout=PATIENCE) as client:
        yield client


def test_openais_client_embeds(client: "openai.OpenAI", embedder: Embedder) -> None:
    expected, tokens = embedder.encode(TEXTS), len(embedder.tokenize(TEXTS).ids)
    answer = client.embeddings.create(model="tiny", input=TEXTS)  # which asks for base64
    assert [data.index for data in answer.data] == list(range(5))
    assert_near([data.embedding for data in answer.data], expected)
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("tiny", tokens, tokens)
    answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    assert_near([data.embedding for data in answer.data], expected)
    answer = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="base64")
    assert_near(np.frombuffer(base64.b64decode(answer.data[0].embedding), "<f4"), expected[0])  # type: ignore[arg-type]
    ids = embedder.tokenizer(TEXTS)["input_ids"]
    assert_near([data.embedding for data in client.embeddings.create(model="tiny", input=ids).data], expected)
    answer = client.embeddings.create(model="tiny", input=TEXTS, dimensions=7, user="somebody")
    short = expected[:, :7]
    assert_near([data.embedding for data in answer.data], short / np.linalg.norm(short, axis=1, keepdims=True))


def test_openais_client_knows_the_errors(client: "openai.OpenAI") -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fastbert"
    with pytest.raises(openai.NotFoundError, match="there is no model 'ada', but 'tiny'"):
        client.embeddings.create(model="ada", input="a")
    with pytest.raises(openai.BadRequestError, match="input is empty") as error:
        client.embeddings.create(model="tiny", input=[])
    assert (error.value.param, error.value.type) == ("input", "invalid_request_error")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


CLIENT = """
import json, sys, threading, urllib.request
def ask():
    headers = {"Authorization": "Bearer sesame"}
    while True:
        body = json.dumps({"inputs": ["the big red house and the small bird sang on"] * 200}).encode()
        urllib.request.urlopen(urllib.request.Request(sys.argv[1] + "/embed", body, headers)).read()
        print("answered", flush=True)
for _ in range(4):
    threading.Thread(target=ask).start()
"""


def test_nothing_is_lost_or_mixed_up_under_a_load(client: "openai.OpenAI", server: Process, embedder: Embedder) -> None:
    """Each answer is the offline run's, while one client is killed and others go away."""
    expected = embedder.encode(MANY)
    killed = subprocess.Popen([sys.executable, "-c", CLIENT, server.url], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    killed.stdout.readline()  # it is in the midst of it
    asked = threading.Event()

    def ask(seed: int) -> list[tuple[int, list[float]]]:
        random, found = Random(seed), []
        for turn in range(8):
            rows = random.sample(range(len(MANY)), random.choice([1, 2, 30]))
            answer = client.embeddings.create(model="tiny", input=[MANY[row] for row in rows])
            found += [(row, data.embedding) for row, data in zip(rows, answer.data, strict=True)]
            if turn == 3:
                asked.set()
        return found

    def go_away(seed: int) -> None:
        headers = {"Authorization": "Bearer sesame"}
        for _ in range(6):
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{server.url}/embed", json={"inputs": MANY * 2}, headers=headers, timeout=0.02)

    with ThreadPoolExecutor(14) as pool:
        leaving = [pool.submit(go_away, seed) for seed in range(2)]
        asking = [pool.submit(ask, seed) for seed in range(12)]
        asked.wait(PATIENCE)
        killed.kill()
        killed.communicate()
        found = [pair for task in asking for pair in task.result(PATIENCE)]
        for task in leaving:
            task.result(PATIENCE)
    assert len(found) >= 12 * 8
    assert_near([vector for _, vector in found], expected[[row for row, _ in found]])
    until(lambda: "fastbert_queue_texts 0.0" in httpx.get(f"{server.url}/metrics").text)
    page = httpx.get(f"{server.url}/metrics").text
    assert "fastbert_failures_total 0.0" in page
    assert "fastbert_disconnects_total 0.0" not in page


def test_sigterm_answers_what_has_come(checkpoint: str, embedder: Embedder) -> None:
    texts = MANY * 2

    def ask() -> httpx.Response:
        return httpx.post(f"{server.url}/v1/embeddings", json={"model": "a/b", "input": texts}, timeout=PATIENCE)

    options = ("--batch-tokens", "100", "--name", "a/b")  # many batches
    with process(checkpoint, *options) as server, ThreadPoolExecutor(3) as pool:
        assert httpx.get(f"{server.url}/v1/models/a/b").json()["id"] == "a/b"
        asking = [pool.submit(ask) for _ in range(3)]
        until(lambda: "fastbert_queue_texts 2400.0" in httpx.get(f"{server.url}/metrics").text)
        status, err = server.stop()
        answers = [task.result(PATIENCE) for task in asking]
    for answer in answers:
        assert answer.status_code == 200
        assert_near([data["embedding"] for data in answer.json()["data"]], embedder.encode(texts))
    assert (status, err) == (0, "fastbert: stopped after 3 requests\n")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
