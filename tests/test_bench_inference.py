"""The benches of inference: texts, what is made once, hosts that sort and pad, what counts as agreement."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bench import bench_quality, clock, exports, peers, texts
from bench.attempts import is_error, reason
from bench.bench_inference import TOLERANCE, case_of, wrong
from bench.harness import NotApplicableError, Ready
from bench.record import OURS, Work, split
from tests.test_bench import make_bench


@pytest.fixture(params=["shared data", "fables"])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the shared data, and as where there is none."""
    if request.param == "fables":
        monkeypatch.setattr(texts, "DATA", Path("/nowhere"))
    elif not texts.DATA.is_dir():
        pytest.skip("needs ../shared/data")
    texts.items.cache_clear()
    return str(request.param)


@pytest.mark.parametrize("task", texts.TASKS)
def test_a_task_has_as_many_texts_as_it_is_asked_for(task: str, anywhere: str) -> None:
    it, found = texts.TASKS[task], texts.items(task, 24)
    texts.items.cache_clear()
    assert found == texts.items(task, 24)
    assert len({*found}) == 24
    assert (
        texts.source(task) == case_of("tiny", task, 24)["source"] == (it.source if anywhere != "fables" else "fables")
    )
    passages = [item[1] if it.pairs else item for item in found]
    assert all(isinstance(text, str) for text in passages)
    lengths = [len(str(text).split()) for text in passages]
    assert it.words[0] <= min(lengths)
    assert max(lengths) <= it.words[1]
    if task == "rerank":
        assert len({item[0] for item in found}) == 1
    if task == "unsorted" and anywhere != "fables":
        assert max(lengths[:8]) > 40  # not STS-B's before all others


def test_what_is_calibrated_with_is_not_what_is_measured_with(anywhere: str) -> None:
    assert len(texts.sample(16, pairs=False)) == len(texts.sample(16, pairs=True)) == 16
    assert all(len(pair) == 2 for pair in texts.sample(16, pairs=True))
    if anywhere != "fables":
        sentences = {text for first, second, _ in texts.scored_sentences() for text in (first, second)}
        assert not sentences & {*texts.sample(300, pairs=False)}


def test_what_was_made_is_made_once_and_whole(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "a").touch()
        if len(made) == 1:
            raise RuntimeError("killed half way")

    with pytest.raises(RuntimeError, match="half way"):
        exports._once(tmp_path / "peer", make)
    assert not [*tmp_path.iterdir()]
    for _ in range(2):
        assert [path.name for path in exports._once(tmp_path / "peer", make).iterdir()] == ["a"]
    assert len(made) == 2


def test_two_processes_make_the_same(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "mine").touch()
        (tmp_path / "peer").mkdir()
        (tmp_path / "peer/theirs").touch()

    exports._once(tmp_path / "peer", make)
    assert [path.name for path in tmp_path.rglob("*")] == ["peer", "theirs"]


class TorchRuntime(peers.Padded):
    """The host of the other runtimes, around a model that needs none of them."""

    def __init__(self, pairs: bool) -> None:
        folder = exports.checkpoint("tiny", pairs)
        super().__init__(folder, pairs, 64)
        kind: Any = transformers.BertForSequenceClassification if pairs else transformers.BertModel
        self.model = kind.from_pretrained(folder).eval()
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: dict[str, Any]) -> peers.Result:
        self.shapes.append(inputs["input_ids"].shape)
        with torch.inference_mode():
            output = self.model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        found: torch.Tensor = output.logits if self._pairs else output.last_hidden_state
        return found.numpy()


@pytest.mark.parametrize("pairs", [False, True])
def test_the_runtimes_host_sorts_pads_and_gives_results_in_order(pairs: bool) -> None:
    items = texts.items("pairs" if pairs else "unsorted", 40)
    expected = peers.reference("tiny", items, pairs, 64, "cpu")
    runtime = TorchRuntime(pairs)
    for found in (runtime.encode(items), runtime.tokenized(items)()):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [shape[0] for shape in runtime.shapes[:2]] == [32, 8]
    assert runtime.shapes[0][1] >= runtime.shapes[1][1]


def test_sentence_transformers_tokenised_before_gives_the_same() -> None:
    pytest.importorskip("sentence_transformers")
    for pairs in (False, True):
        items = texts.items("pairs" if pairs else "unsorted", 40)
        peer = peers.peer("sentence-transformers, patched", "tiny", pairs, 64, "cpu", "fp32")
        np.testing.assert_allclose(peer.tokenized(items)(), peer.encode(items), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "module"), [("ONNX Runtime int8", "onnxruntime"), ("OpenVINO", "openvino"), ("CTranslate2", "ctranslate2")]
)
def test_a_runtime_that_is_missing_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotApplicableError, match=rf"{module}\.\w+ is not here") as caught:
        peers.peer(name, "tiny", False, 64, "cpu", "fp32")
    assert not is_error(str(caught.value))
    assert is_error(reason(ValueError("no")))
    assert is_error("wrong: a cosine")


def test_what_agrees() -> None:
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(100, 32)).astype(np.float32)
    for precision, tolerance in TOLERANCE.items():
        noise = rng.normal(size=expected.shape).astype(np.float32)
        assert wrong(3 * expected, expected, precision) is None  # normalised or not
        assert wrong(expected + 0.5 * tolerance**0.5 * noise, expected, precision) is None
        assert "a cosine of" in str(wrong(expected + 4 * tolerance**0.5 * noise, expected, precision))
        assert "a cosine of" in str(wrong(expected[[1, 0, *range(2, 100)]], expected, precision))
        assert "a cosine of" in str(wrong(np.full_like(expected, np.nan), expected, precision))
    scores = np.float32([0.9, 0.91, 0.93, 0.92])
    assert wrong(scores, scores, "fp32") is None
    assert "a cosine of" in str(wrong(scores[::-1].copy(), scores, "int8"))
    assert "results are (3,), not (4,)" in str(wrong(scores[:3], scores, "int8"))


def test_a_name_says_its_precision() -> None:
    assert split("fastbert", "fp32") == ("fastbert", "fp32")
    assert split("ONNX Runtime int8", "fp32") == ("ONNX Runtime", "int8")
    assert split("sentence-transformers, FlashAttention-2", "bf16") == (
        "sentence-transformers, FlashAttention-2",
        "bf16",
    )


def test_turns_are_the_fewest() -> None:
    for turns in (2, 7):
        _, times = clock.cpu_timings({"a": lambda: None}, iter(range(1000)).__next__, 0.0, turns)
        assert len(times["a"]) == turns


def test_what_ends_on_the_host_is_timed_by_its_clock_on_a_gpu_too(tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "run.json")
    bench.device = "cuda"
    row = bench.steps("inference", {}, {OURS: lambda: Ready([lambda: None], host=True)}, Work())
    assert row.timings[OURS].how == "clock"


def _of(scores: Sequence[float], a: Sequence[str], b: Sequence[str]) -> Any:
    """An encoder in which two texts are as alike as their scores say."""
    angle = {text: 0.0 for text in a} | {text: 1.5 - score for text, score in zip(b, scores, strict=True)}
    return lambda them: np.float32([[np.cos(angle[text]), np.sin(angle[text])] for text in them])


def test_quality_is_the_correlation_with_peoples_judgement(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    a, b, scores = ["x", "y", "z"], ["p", "q", "r"], [0.1, 1.2, 0.7]
    monkeypatch.setattr(texts, "scored_sentences", lambda: [*zip(a, b, scores, strict=True)])
    assert bench_quality.correlation(_of(scores, a, b)) == pytest.approx(100)
    assert bench_quality.correlation(_of([-score for score in scores], a, b)) == pytest.approx(-100)
    lengths = {text: 9.0**i for i, text in enumerate("pxqyrz")}  # of vectors: they do not count
    scaled = lambda them: _of(scores, a, b)(them) * np.float32([[lengths[text]] for text in them])  # noqa: E731
    assert bench_quality.correlation(scaled) == pytest.approx(100)


def test_quality_is_what_a_probe_gets_right(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    rows = [(text, int("good" in text)) for text in ("good a", "bad b", "good c", "bad d")]
    monkeypatch.setattr(texts, "labelled_sentences", lambda part: rows)

    def encode(them: Sequence[str], sign: float = 1.0, *_: Any) -> peers.Result:
        return np.float32([[1.0, sign * (1 if "good" in text else -1)] for text in them])

    monkeypatch.setattr(peers, "reference", lambda model, them, *_: encode(them))
    bench_quality._probe.cache_clear()
    assert bench_quality.accuracy(encode, None, "tiny") == 100
    assert bench_quality.accuracy(partial(encode, sign=-1.0), None, "tiny") == 0
