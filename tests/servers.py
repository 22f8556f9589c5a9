"""Servers for the tests: a process of its own, or a thread whose model waits for a gate."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import torch

from fastbert.inference.server.models import load
from fastbert.inference.server.run import Server, bound
from fastbert.inference.server.service import Limits, Served, Service
from fastbert.inference.tokens import Tokens
from tests.checkpoints import tiny_checkpoint

LONG = "the cat sat on the mat and " * 20  # more than a tiny checkpoint takes
LIMITS = Limits(queue=12, texts=8, body=4000)
PATIENCE = 60.0  # seconds: machines may be busy


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@dataclass
class Process:
    """`fastbert serve` in a process of its own."""

    popen: subprocess.Popen[str]
    url: str

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit status, and what stderr said after the line that it is ready."""
        self.popen.send_signal(number)
        _, err = self.popen.communicate(timeout=PATIENCE)
        return self.popen.returncode, err


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "fastbert", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert popen.stderr is not None
        line = popen.stderr.readline()
        found = re.fullmatch(r"fastbert: .* is ready at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line
        yield Process(popen, found[1])
    finally:
        popen.kill()
        popen.communicate()


@dataclass
class Gate:
    """A model's `run` that waits for a gate, and keeps what it is given."""

    run: Callable[[Tokens], npt.NDArray[np.float32]]
    batches: list[Tokens] = field(default_factory=list)
    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    poison: int | None = None  # an id that the model cannot take

    def __call__(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        self.entered.set()
        assert self.opened.wait(PATIENCE)
        self.batches.append(tokens)
        if self.poison in tokens.ids:
            raise RuntimeError("poisoned")
        return self.run(tokens)

    def shut(self) -> None:
        self.opened.clear()
        self.entered.clear()
        self.batches.clear()


@dataclass
class Held:
    """A server in a thread, behind a gate."""

    url: str
    gate: Gate
    service: Service
    server: Server

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"fastbert_{name}", labels) or 0.0

    def until_waiting(self, requests: int) -> None:
        """Until so many are tokenised and wait for the model: `queue_texts` counts what is merely accepted."""
        until(lambda: self.service.batcher.waiting == requests)

    def in_thread(self, path: str, body: object) -> "threading.Thread":
        """A request whose answer is then the thread's `response`."""

        class Asking(threading.Thread):
            def run(self) -> None:
                self.response = httpx.post(url, json=body, timeout=PATIENCE)

        url = self.url + path
        thread = Asking()
        thread.start()
        return thread


@contextlib.contextmanager
def held(served: Served, limits: Limits | None = None, *, api_key: str | None = None) -> Iterator[Held]:
    gate = Gate(served.run)
    gate.opened.set()
    service = Service(replace(served, run=gate), limits or Limits(), api_key=api_key)
    listener, ready = bound("127.0.0.1", 0), threading.Event()
    server = Server(service, listener, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        yield Held(f"http://127.0.0.1:{listener.getsockname()[1]}", gate, service, server)
    finally:
        gate.opened.set()
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def loaded(checkpoint: str, **options: Any) -> Served:
    return load(checkpoint, name=None, dtype=torch.float32, device=torch.device("cpu"), **options)


def prompted_checkpoint(folder: Path) -> str:
    """One whose prompt is left out of its vectors."""
    tiny_checkpoint(folder)
    prompts = {"prompts": {"query": "the big red "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "include_prompt": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return str(folder)


def scored_checkpoint(folder: Path, labels: int, **config: object) -> str:
    names = {str(i): f"label {i}" for i in range(labels)}
    return tiny_checkpoint(folder, "BertForSequenceClassification", id2label=names, num_labels=labels, **config)


def post(server: Held, path: str, body: object, **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=PATIENCE, **options)


def assert_near(actual: object, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=1e-5, rtol=0)


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
