"""Tokens per second through `fastbert serve`, loaded from another process, and of one offline run on the same texts.

Offline and served take turns; each answer is compared with the offline vector before it counts.
"""

import base64
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from fastbert.inference.embedder import Embedder

LOADS = ((32, 1), (128, 1), (16, 8), (8, 64), (4, 512))  # clients, texts of a request
ROUNDS = 3
_SIZE = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(model: str, texts: Path, *, dtype: str, device: str) -> None:
    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line]
    embedder = Embedder.from_pretrained(model, dtype=_DTYPES[dtype], device=device)
    expected = embedder.encode(lines)
    tokens = len(embedder.tokenize(lines).ids)
    print(f"{len(lines):,} texts, {tokens:,} tokens, {dtype} on {device}")
    command = [sys.executable, "-m", "fastbert", "serve", model, "--port", "0", "--name", "model"]
    command += ["--dtype", dtype, "--device", device]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        ready = server.stderr.readline()
        found = re.search(r"http://127.0.0.1:(\d+)", ready)
        if found is None:
            raise SystemExit(ready)
        for clients, of_request in LOADS:
            ratios = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                embedder.encode(lines)
                offline = time.perf_counter() - start
                served, seconds = _load(int(found[1]), texts, clients, of_request)
                np.testing.assert_allclose(served, expected, atol=1e-4 if dtype == "fp32" else 3e-2)
                ratios.append((offline / seconds, tokens / seconds, tokens / offline))
            ratio, rate, offline_rate = (statistics.median(column) for column in zip(*ratios, strict=True))
            what = f"{clients} clients, {of_request} texts a request"
            print(f"{what:34} {rate:10,.0f} tokens/s, offline {offline_rate:10,.0f}: {ratio:.2f}", flush=True)
    finally:
        server.terminate()
        server.wait()


def _load(port: int, texts: Path, clients: int, of_request: int) -> tuple[npt.NDArray[np.float32], float]:
    """Vectors and seconds, of clients in a process of their own."""
    command = [sys.executable, __file__, str(port), str(texts), str(clients), str(of_request)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    head, _, body = done.stdout.partition(b"\n")
    width, seconds = head.split()
    return np.frombuffer(body, "<f4").reshape(-1, int(width)), float(seconds)


def _client(port: int, texts: Path, clients: int, of_request: int) -> None:
    """All clients in one thread, on bare sockets: what they take of the cores is not the server's."""
    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line]
    bodies = [
        json.dumps({"model": "model", "input": lines[i : i + of_request], "encoding_format": "base64"}).encode()
        for i in range(0, len(lines), of_request)
    ]
    answers = [b""] * len(bodies)
    waiting = deque(enumerate(b"POST /v1/embeddings HTTP/1.1\r\nHost: bench\r\n" + _sized(body) for body in bodies))
    selector = selectors.DefaultSelector()
    start = time.perf_counter()
    for _ in range(min(clients, len(bodies))):
        connection = socket.create_connection(("127.0.0.1", port))
        number, request = waiting.popleft()
        selector.register(connection, selectors.EVENT_READ, (number, bytearray()))
        connection.sendall(request)
    while selector.get_map():
        for key, _ in selector.select():
            connection = cast(socket.socket, key.fileobj)
            number, answer = key.data
            received = connection.recv(1 << 20)
            if not received:
                raise SystemExit("the server closed a connection")
            answer += received
            head, _, body = answer.partition(b"\r\n\r\n")
            size = _SIZE.search(head)
            if size is None or len(body) < int(size[1]):
                continue
            answers[number] = bytes(body)
            if not waiting:
                selector.unregister(connection)
                connection.close()
                continue
            number, request = waiting.popleft()
            selector.modify(connection, selectors.EVENT_READ, (number, bytearray()))
            connection.sendall(request)
    seconds = time.perf_counter() - start
    vectors = [base64.b64decode(data["embedding"]) for answer in answers for data in json.loads(answer)["data"]]
    sys.stdout.buffer.write(f"{len(vectors[0]) // 4} {seconds}\n".encode() + b"".join(vectors))


def _sized(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n" % len(body) + body


if __name__ == "__main__":
    _client(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
