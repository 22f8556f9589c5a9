"""What a precision costs: MiniLM's vectors against people's judgements.

"STS-B": Spearman's correlation, in percent, of cosines with how alike people found two sentences, dev set. "SST-2": the
percentage of the dev set that a logistic regression gets right, learnt from float32's vectors of 1,000 sentences.
Of what computes in float32 only fastbert and sentence-transformers: the others agree with them to six digits.
"""

from functools import cache, partial
from typing import Any

import numpy as np
import pytest

from bench import peers, texts
from bench.attempts import is_error
from bench.bench_inference import OTHERS, PRECISIONS
from bench.harness import Bench, Figures
from bench.record import OURS, split
from bench.rivals import installed
from bench.shown import STOCK

LEARNT = 1000  # sentences
MAX_LENGTH = 256


def case_of(model: str, what: str, dtype: str, count: int | None = None) -> dict[str, Any]:
    """`count` of the set's rows, or all."""
    return {"model": model, "what": what, "dtype": dtype} | ({} if count is None else {"rows": count})


SMALLEST = [case_of("tiny", "STS-B", "fp32", 40), case_of("tiny", "SST-2", "fp32", 40)]
CASES = {
    "cpu": [case_of("MiniLM", what, "fp32") for what in ("STS-B", "SST-2")],
    "cuda": [case_of("MiniLM", what, "bf16") for what in ("STS-B", "SST-2")],
}


def test_quality(case: dict[str, Any], untimed: Bench) -> None:
    measure = {"STS-B": correlation, "SST-2": accuracy}[case["what"]]
    if not texts.DATA.is_dir():
        pytest.skip("needs ../shared/data")
    names = [OURS, STOCK, *(f"{OURS} {precision}" for precision in PRECISIONS[untimed.device])]
    names += [name for name in OTHERS[untimed.device] if split(name, "fp32")[1] != "fp32" and name not in names]

    def figures(name: str) -> Figures:
        peer = peers.peer(name, case["model"], False, MAX_LENGTH, untimed.device, case["dtype"])
        return Figures(values={name: measure(peer.encode, case.get("rows"), case["model"])})

    row = untimed.figures("quality", case, {name: partial(figures, name) for name in names}, unit="%")
    assert untimed.measure or not any(map(is_error, row.failures.values())), row.failures


def correlation(encode: Any, count: int | None = None, _model: str = "") -> float:
    first, second, scores = zip(*texts.scored_sentences()[:count], strict=True)
    distinct = sorted({*first, *second})
    vectors = _normalised(encode(distinct))
    place = {text: i for i, text in enumerate(distinct)}
    a, b = (vectors[[place[text] for text in side]] for side in (first, second))
    spearmanr = installed("scipy.stats", "spearmanr")
    return 100 * float(spearmanr((a * b).sum(-1), scores).statistic)


def accuracy(encode: Any, count: int | None, model: str) -> float:
    sentences, labels = zip(*texts.labelled_sentences("dev")[:count], strict=True)
    return 100 * float(_probe(model, count).score(_normalised(encode(list(sentences))), labels))


@cache
def _probe(model: str, count: int | None) -> Any:
    regression = installed("sklearn.linear_model", "LogisticRegression")(max_iter=1000)
    sentences, labels = zip(*texts.labelled_sentences("train")[: count or LEARNT], strict=True)
    vectors = peers.reference(model, sentences, False, MAX_LENGTH, "cpu")
    return regression.fit(_normalised(vectors), labels)


def _normalised(vectors: peers.Result) -> peers.Result:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
