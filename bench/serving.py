"""Tokens per second through `fastbert serve`, loaded from another process, and of one offline run on the same texts.

Offline and served take turns; each answer is compared with the offline vector before it counts.
"""

import base64
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastbert.inference.embedder import Embedder

LOADS = ((32, 1), (16, 8), (8, 64), (4, 512))  # clients, texts of a request
ROUNDS = 3
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


def _ask(port: int, bodies: Sequence[bytes], next_body: list[int], lock: threading.Lock, answers: list[bytes]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    while True:
        with lock:
            i = next_body[0]
            next_body[0] += 1
        if i >= len(bodies):
            return
        connection.request("POST", "/v1/embeddings", bodies[i])
        answers[i] = connection.getresponse().read()


def _client(port: int, texts: Path, clients: int, of_request: int) -> None:
    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line]
    bodies = [
        json.dumps({"model": "model", "input": lines[i : i + of_request], "encoding_format": "base64"}).encode()
        for i in range(0, len(lines), of_request)
    ]
    answers = [b""] * len(bodies)
    next_body, lock = [0], threading.Lock()
    threads = [threading.Thread(target=_ask, args=(port, bodies, next_body, lock, answers)) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    vectors = [base64.b64decode(data["embedding"]) for answer in answers for data in json.loads(answer)["data"]]
    sys.stdout.buffer.write(f"{len(vectors[0]) // 4} {seconds}\n".encode() + b"".join(vectors))


if __name__ == "__main__":
    _client(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
