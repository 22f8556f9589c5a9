"""What every request goes through: its key, its body, a place in the queue, tokens, results.

Dimension key:  B texts   N elements of a result
"""

import asyncio
import contextlib
import hmac
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive
from torch import Tensor

from fastbert.errors import InputError
from fastbert.inference.engine import Engine
from fastbert.inference.loading import vocabulary_size
from fastbert.inference.server.batching import Batcher, Results
from fastbert.inference.server.metrics import Metrics
from fastbert.inference.server.refusals import (
    CLOSING,
    FAILED,
    FIELD,
    FULL,
    NO_KEY,
    OTHER_KIND,
    TOO_LARGE,
    TOO_LONG,
    TOO_MANY,
    Refusal,
)
from fastbert.inference.tokens import Tokens, joined
from fastbert.terminal import counted

_CHUNK = 64  # texts that are tokenised at a time: others' come between
_AT_ONCE = 1000  # characters that are tokenised where they come: a thread's turn would take longer
_TOKENIZERS = 4  # threads, for a long text not to hold up the others
_READ_ON = 4  # times the largest body that are read, and dropped, for a client to get to its answer

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """A model, and what it does.

    Attributes:
        kind: "embedder", "reranker" or "classifier".
        name: what requests call it.
        tokenize: texts, or pairs of texts, to tokens; threads call it. An embedder's takes a `prompt`, too.
        run: tokens of B texts to (B, N) float32: vectors, or logits.
        labels, scoring: of logits: (N,) names, and from logits to scores.
    """

    kind: str
    name: str
    engine: Engine
    tokenize: Callable[..., Tokens]
    run: Callable[[Tokens], Results]
    labels: Sequence[str] = ()
    scoring: Callable[[Tensor], Tensor] = torch.sigmoid


@dataclass(frozen=True)
class Limits:
    """Of a server.

    Attributes:
        queue: texts that are accepted and not yet answered.
        texts: of one request.
        body: bytes of one request.
    """

    queue: int = 8192
    texts: int = 2048
    body: int = 4 << 20

    def __post_init__(self) -> None:
        if self.texts > self.queue:
            raise InputError(f"a request of {self.texts} texts never has room in a queue of {self.queue}")


class Service:
    """One model, for requests of many clients.

    Args:
        api_key: what requests have to bring as a bearer token, if anything.

    Attributes:
        width: N.
        closing: new requests are turned away.
        batcher: what runs the model, on tokens.
    """

    def __init__(self, served: Served, limits: Limits, *, api_key: str | None = None) -> None:
        self.served, self.limits = served, limits
        self.metrics = Metrics()
        self.started = int(time.time())
        self.closing = False
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self.batcher = Batcher(served.run, served.engine.batch_tokens, self.metrics)
        self._tokenizers = ThreadPoolExecutor(_TOKENIZERS, "fastbert tokenizer")
        self._accepted = 0  # texts
        # The longest text there is, so that what a model can't do, or compiles, comes before the first request.
        longest = served.tokenize(["a " * served.engine.max_length])
        self.width = int(self.batcher.submit(longest).result().shape[1])

    def close(self) -> None:
        """When what is queued is done."""
        self._tokenizers.shutdown(cancel_futures=True)
        self.batcher.close()

    def admit(self, request: Request) -> None:
        """Raises: Refusal, if the server stops or the request lacks the key."""
        if self.closing:
            raise Refusal(CLOSING, "the server is stopping", retry_after=1)
        given = request.headers.get("authorization", "").encode()
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise Refusal(NO_KEY, "the request has no valid key: send 'Authorization: Bearer KEY'")

    def must_be(self, *kinds: str) -> None:
        """Raises: Refusal, if the model is of another kind."""
        if self.served.kind not in kinds:
            a = {"embedder": "an embedder", "reranker": "a reranker", "classifier": "a classifier"}
            serves = {"embedder": "/v1/embeddings, /embed", "reranker": "/rerank, /predict", "classifier": "/predict"}
            what, where = a[self.served.kind], serves[self.served.kind]
            raise Refusal(OTHER_KIND, f"{self.served.name} is {what}: ask {where}")

    async def body(self, request: Request) -> bytes:
        """Raises: Refusal, if it is too large; ClientDisconnect."""
        announced = request.headers.get("content-length", "0")
        size, chunks = 0, []
        too_large = announced.isdigit() and int(announced) > self.limits.body
        async for chunk in request.stream():
            size += len(chunk)
            too_large = too_large or size > self.limits.body
            if not too_large:
                chunks.append(chunk)
            elif size > _READ_ON * self.limits.body:
                break
        if too_large:
            raise Refusal(TOO_LARGE, f"the body has more than {self.limits.body} bytes")
        return b"".join(chunks)

    async def tokenizing(self, work: Callable[[], T]) -> T:
        """What this gives, in one of the tokenizers' threads."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, work)

    async def results(
        self, request: Request, items: Sequence[Any], *, truncate: bool, **options: Any
    ) -> tuple[Results, int]:
        """(B, N), a row for each item, and the tokens of all.

        Args:
            items: texts, pairs of texts, or lists of token ids, at least one.
            truncate: cut what is too long, instead of refusing it; ids are never cut.
            options: of the model's `tokenize`.

        Raises:
            Refusal: if there are too many items, one is too long, the queue is full or the model fails.
            ClientDisconnect: if the client goes away first; what is not done yet is dropped.
        """
        with self.place(len(items)):
            work = asyncio.ensure_future(self._work(items, truncate, options))
            gone = asyncio.ensure_future(_until_disconnect(request.receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnect
                return work.result()
            finally:
                work.cancel()
                gone.cancel()

    async def healthy(self) -> bool:
        """Whether the model runs; where its last batch failed, another one is tried."""
        if self.batcher.failing:
            tokens = await self.tokenizing(lambda: self.served.tokenize(["healthy?"]))
            with contextlib.suppress(Exception):
                await asyncio.wrap_future(self.batcher.submit(tokens))
        return not self.batcher.failing

    @contextlib.contextmanager
    def place(self, texts: int) -> Iterator[None]:
        """Texts count as accepted. Raises: Refusal, if there are too many."""
        if texts > self.limits.texts:
            raise Refusal(TOO_MANY, f"the request has {texts} texts, but {self.limits.texts} are allowed")
        if self._accepted + texts > self.limits.queue:
            seconds = math.ceil(self._accepted * self.batcher.seconds_per_text)
            raise Refusal(FULL, "the queue is full: try again later", retry_after=min(max(seconds, 1), 60))
        self._add(texts)
        try:
            yield
        finally:
            self._add(-texts)

    def _add(self, texts: int) -> None:
        self._accepted += texts
        self.metrics.queue.set(self._accepted)

    async def _work(self, items: Sequence[Any], truncate: bool, options: dict[str, Any]) -> tuple[Results, int]:
        if isinstance(items[0], list):
            tokens = self._checked_ids(items)
        else:
            tokens = await self._tokens(items, options)
        if tokens.cut and not truncate:
            most = self.served.engine.max_length
            which = f"{tokens.cut} of {counted(len(items), 'text')} {'has' if tokens.cut == 1 else 'have'}"
            raise Refusal(TOO_LONG, f"{which} more than {most} tokens")
        self.metrics.cut.inc(tokens.cut)
        try:
            return await asyncio.wrap_future(self.batcher.submit(tokens)), len(tokens.ids)
        except Exception as error:
            raise Refusal(FAILED, "the model failed; the server's log says why") from error

    async def _tokens(self, items: Sequence[Any], options: dict[str, Any]) -> Tokens:
        parts, at_once = [], _characters(items) <= _AT_ONCE
        for start in range(0, len(items), _CHUNK):
            work = partial(self.served.tokenize, items[start : start + _CHUNK], **options)
            try:
                parts.append(work() if at_once else await self.tokenizing(work))
            except InputError as error:
                raise Refusal(FIELD, str(error)) from error
        return joined(parts)

    def _checked_ids(self, rows: Sequence[Sequence[int]]) -> Tokens:
        vocabulary, most = vocabulary_size(self.served.engine.model), self.served.engine.max_length
        for i, row in enumerate(rows):
            if len(row) > most:
                raise Refusal(TOO_LONG, f"number {i} has {len(row)} token ids, but the model takes {most}")
            if min(row) < 0 or max(row) >= vocabulary:
                raise Refusal(FIELD, f"number {i} has token ids that are not in [0, {vocabulary})")
        lengths = np.array([len(row) for row in rows], np.int64)
        return Tokens(np.concatenate([np.array(row, np.int32) for row in rows]), lengths)


def _characters(items: Sequence[Any]) -> int:
    """Of texts, or pairs of texts."""
    return sum(len(item) if isinstance(item, str) else sum(map(len, item)) for item in items)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
