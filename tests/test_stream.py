"""Any number of items through an engine: order, windows, what is in memory, who waits for whom, and how it ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fastbert.errors import InputError
from fastbert.inference import stream as module
from fastbert.inference.embedder import Embedder
from fastbert.inference.stream import Stream, Window
from fastbert.inference.tokens import Tokens
from tests.checkpoints import TEXTS, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """An engine whose tokens are letters, and whose result is the number of the text: "12 abc" gives 12."""

    def __init__(self, before: Callable[[int], None] = lambda calls: None) -> None:
        self.tokenized: list[list[str]] = []
        self.results_of: list[int] = []
        self._before = before

    def tokenize(self, items: Sequence[str]) -> Tokens:
        if "bad" in items:
            raise InputError("a bad text")
        self.tokenized.append(list(items))
        ids = np.array([ord(letter) for item in items for letter in item], np.int32)
        return Tokens(ids, np.array([len(item) for item in items]), cut=sum(len(item) > 9 for item in items))

    def results(self, tokens: Tokens, progress: Callable[[int], None] | None = None) -> list[int]:
        self._before(len(self.results_of))
        self.results_of.append(len(tokens.lengths))
        texts = np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])
        for text in texts:
            if progress is not None:
                progress(len(text))
        return ["".join(map(chr, text)) for text in texts]


def ended() -> bool:
    """Whether no thread of a stream is left, after a while at most."""
    for _ in range(500):
        if not any(thread.name == "fastbert-tokenizer" for thread in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


def numbered(count: int) -> Iterator[str]:
    return (f"text {number}" for number in range(count))


@pytest.mark.parametrize(("window", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (100, [10]), (1, [1] * 10)])
def test_results_come_in_order_in_windows(window: int, sizes: list[int]) -> None:
    windows = list(Stream(Letters(), numbered(10), window=window))
    assert [len(each.rows) for each in windows] == sizes
    assert [row for each in windows for row in each.rows] == list(numbered(10))
    assert [result for each in windows for result in each.results] == list(numbered(10))
    assert ended()


def test_nothing_comes_of_nothing() -> None:
    assert list(Stream(Letters(), [])) == []


def test_long_texts_make_short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_WINDOW", 10)
    sizes = [len(window.rows) for window in Stream(Letters(), ["a" * 4, "b" * 4, "c" * 4, "d", "e" * 100, "f"])]
    assert sizes == [3, 2, 1]
    pairs = Stream(Letters(), [("aaa", "bbb"), ("cc", "dd"), ("e", "f")], "".join)
    assert [len(window.rows) for window in pairs] == [2, 1]


def test_vectors_are_those_of_encode(tmp_path: Path) -> None:
    embedder = Embedder.from_pretrained(tiny_checkpoint(tmp_path), batch_tokens=20)
    texts = TEXTS * 5
    windows: list[Window[str]] = list(Stream(embedder, iter(texts), window=7))
    np.testing.assert_allclose(np.concatenate([w.results for w in windows]), embedder.encode(texts), atol=1e-5)
    assert sum(window.empty for window in windows) == 5


def test_rows_are_what_an_item_is_made_of() -> None:
    rows = [{"text": "one"}, {"text": " "}, {"text": "more than nine"}]
    (window,) = Stream(Letters(), rows, lambda row: row["text"])
    assert window.rows == rows
    assert (window.empty, window.tokens.cut) == (1, 1)


@pytest.mark.parametrize("count", [100, 1000])
def test_memory_is_that_of_a_few_windows(count: int) -> None:
    class Counted(str):
        alive = most = 0

        def __new__(cls, text: str) -> "Counted":
            cls.alive += 1
            cls.most = max(cls.most, cls.alive)
            return super().__new__(cls, text)

        def __del__(self) -> None:
            Counted.alive -= 1

    class Short(Letters):
        def tokenize(self, items: Sequence[str]) -> Tokens:
            return Tokens(np.zeros(len(items), np.int32), np.ones(len(items), np.int64))

    seen = 0
    for window in Stream(Short(), (Counted(text) for text in numbered(count)), window=5):
        time.sleep(0.0005)
        seen += len(window.rows)
        del window
    assert seen == count
    assert 5 <= Counted.most <= 5 * (module._AHEAD + 3)


def test_the_next_window_is_tokenised_while_one_is_encoded() -> None:
    ahead = threading.Event()

    def wait(calls: int) -> None:
        if calls == 0:
            assert ahead.wait(20)

    class Telling(Letters):
        def tokenize(self, items: Sequence[str]) -> Tokens:
            if self.tokenized:
                ahead.set()
            return super().tokenize(items)

    assert len(list(Stream(Telling(wait), numbered(30), window=10))) == 3


def test_the_wait_for_texts_is_measured() -> None:
    def slowly() -> Iterator[str]:
        for text in numbered(4):
            time.sleep(0.05)
            yield text

    waiting = Stream(Letters(), slowly(), window=1)
    list(waiting)
    assert waiting.waited >= 0.15
    encoding = Stream(Letters(lambda calls: time.sleep(0.05)), numbered(20), window=1)
    start = time.perf_counter()
    list(encoding)
    assert encoding.waited < (time.perf_counter() - start) / 2


def broken(count: int) -> Iterator[str]:
    yield from numbered(count)
    raise OSError("the file is gone")


@pytest.mark.parametrize(
    ("rows", "error"),
    [(broken(25), OSError), ([*numbered(25), "bad"], InputError)],
    ids=["of the rows", "of the tokenizer"],
)
def test_an_error_of_the_thread_comes_out_after_what_was_good(rows: Iterator[str], error: type[Exception]) -> None:
    came: list[str] = []
    with pytest.raises(error):
        came.extend(row for window in Stream(Letters(), rows, window=10) for row in window.rows)
    assert came == list(numbered(20))
    assert ended()


def test_an_error_of_the_encoder_ends_the_thread() -> None:
    def fail(calls: int) -> None:
        if calls == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Stream(Letters(fail), numbered(10**9), window=10))
    assert ended()


def test_who_stops_early_ends_the_thread() -> None:
    windows = iter(Stream(Letters(), numbered(10**9), window=10))
    next(windows)
    windows.close()
    assert ended()


def test_who_stops_need_not_wait_for_a_pipe() -> None:
    more = threading.Event()

    def pipe() -> Iterator[str]:
        yield "one"
        more.wait(30)
        yield "two"

    windows = iter(Stream(Letters(), pipe(), window=1))
    assert next(windows).rows == ["one"]
    start = time.perf_counter()
    windows.close()
    assert time.perf_counter() - start < 20
    more.set()
    assert ended()


def test_windows_can_be_left_out() -> None:
    engine = Letters()
    came = [window.rows for window in Stream(engine, numbered(6), window=2, skip=lambda rows: "text 2" in rows)]
    assert came == [["text 0", "text 1"], ["text 4", "text 5"]]
    assert engine.tokenized == came


def test_progress_counts_rows_and_tokens() -> None:
    told: list[tuple[int, int]] = []
    list(Stream(Letters(), ["aa", "bbbb", "c"], window=2, progress=lambda *done: told.append(done)))
    assert told == [(0, 2), (2, 6), (3, 7)]


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="one string"):
        Stream(Letters(), "hello")
    with pytest.raises(InputError, match="window must be at least 1"):
        Stream(Letters(), [], window=0)


AT_A_PIPE = """
from fastbert.inference.inputs import Rows
from fastbert.inference.stream import Stream
from fastbert.inference.tokens import Tokens
import numpy as np

class Engine:
    def tokenize(self, items):
        return Tokens(np.zeros(1, np.int32), np.ones(1, np.int64))
    def results(self, tokens, progress=None):
        print("a window", flush=True)
        return [0]

list(Stream(Engine(), Rows("-"), lambda row: row.item, window=1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_a_process_that_waits_for_a_pipe() -> None:
    """A thread that waits in Python's own stdin would make that a fatal error."""
    read, write = os.pipe()
    os.write(write, b"a text\nand the next")
    command = [sys.executable, "-c", AT_A_PIPE]
    pipe, heeds = (
        subprocess.PIPE,
        partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # in the background it is ignored
    with subprocess.Popen(command, stdin=read, stdout=pipe, stderr=pipe, preexec_fn=heeds) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"a window\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    os.close(read)
    os.close(write)
    assert process.returncode == -signal.SIGINT
    assert b"Fatal" not in err
    assert err.endswith(b"KeyboardInterrupt\n")


GROWTH = """
import random, sys
import torch
from fastbert import Embedder

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
embedder, chance = Embedder.from_pretrained(sys.argv[1]), random.Random(0)
embedder.encode(["cat " * 40] * 8)  # the largest there will be
for call in range(2000):
    texts = [" ".join(["cat"] * chance.randrange(1, 40)) for _ in range(chance.randrange(1, 8))]
    embedder.encode(texts)
    if call == 199:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_thousand_calls_of_random_shapes_leave_memory_as_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GROWTH, tiny_checkpoint(tmp_path, num_hidden_layers=1)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8  # MiB, of 480: hidden states that stay would be 30
