"""Inference as users meet it: from strings to vectors, or from pairs to scores, and the same tokenised before.

fastbert's engines against sentence-transformers, as it comes and patched, ONNX Runtime, OpenVINO and CTranslate2. A
provider computes in the case's dtype unless its name says another one, and has to agree with transformers in float32:
cosines of vectors, or the correlation of scores, by what its precision allows (`TOLERANCE`); `bench/bench_quality.py`
says what that is worth.

The other runtimes are optional, and what they need is made once (`bench/exports.py`). Beside fastbert's own versions:

    pip install -c constraints.txt -e '.[dev]' onnx onnxruntime openvino nncf ctranslate2

Clocks are the host's, on a GPU too: every step ends with its result on the host.
"""

from functools import cache, partial
from typing import Any

from transformers import AutoTokenizer

from bench import exports, peers, texts
from bench.attempts import is_error
from bench.harness import Bench, Ready
from bench.record import OURS, Work, split
from bench.shown import PATCHED, STOCK

TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 3e-3, "int8": 5e-2}  # that a cosine is below 1
OTHERS = {  # than fastbert, in the order in which they take turns
    "cpu": [
        STOCK,
        PATCHED,
        f"{STOCK} bf16",
        *("ONNX Runtime", "ONNX Runtime int8"),
        *("OpenVINO", "OpenVINO bf16", "OpenVINO int8"),
        *("CTranslate2", "CTranslate2 int8"),
    ],
    "cuda": [STOCK, *(f"{STOCK}, {it}" for it in ("patched", "eager", "cuDNN", "FlashAttention-2"))],
}
PRECISIONS = {"cpu": ("bf16", "int8"), "cuda": ("fp16", "int8")}  # of fastbert, beside the case's


def case_of(model: str, task: str, count: int, start: str = "strings", dtype: str = "fp32") -> dict[str, Any]:
    """`start` from "strings", or from "tokens", which is the encoder alone."""
    return {
        "model": model,
        "task": task,
        "texts": count,
        "from": start,
        "dtype": dtype,
        "source": texts.source(task),
    }


SMALLEST = [case_of("tiny", "sentences", 40), case_of("tiny", "rerank", 8), case_of("tiny", "query", 1, "tokens")]
_ON_GPU = {
    "queries": 1024,
    "sentences": 1024,
    "passages": 512,
    "pairs": 256,
    "unpadded": 128,
    "query": 1,
    "rerank": 100,
    "unsorted": 32,
}
_ON_CPU = {
    "queries": 128,
    "sentences": 128,
    "passages": 32,
    "pairs": 12,
    "unpadded": 5,
    "query": 1,
    "rerank": 100,
    "unsorted": 32,
}
GOALS = {
    "cuda": [case_of("base", task, _ON_GPU[task], dtype="bf16") for task in ("queries", "unpadded", "query", "pairs")]
}
CASES = {
    "cpu": [
        *(case_of("MiniLM", task, count) for task, count in _ON_CPU.items()),
        case_of("MiniLM", "query", 1, "tokens"),
        case_of("base", "query", 1),
        case_of("base", "passages", 4),
    ],
    "cuda": [
        case_of(model, task, count, start, "bf16")
        for model in ("base", "MiniLM")
        for task, count in _ON_GPU.items()
        for start in ("strings", "tokens")
    ],
}


def names(case: dict[str, Any], bench: Bench) -> list[str]:
    """The providers of a case."""
    found = [OURS, *(f"{OURS} {precision}" for precision in PRECISIONS[bench.device]), *OTHERS[bench.device]]
    if (
        bench.compiles
        and case["from"] == "strings"
        and (bench.device == "cuda" or case["task"] in ("sentences", "query"))
    ):
        found.append(f"{STOCK}, compiled")
    if bench.device == "cuda" and case["texts"] == 1:
        found.append(f"{OURS}, graphs")
    return found


def test_inference(case: dict[str, Any], bench: Bench) -> None:
    task = texts.TASKS[case["task"]]
    items = texts.items(case["task"], case["texts"])
    of_peer = (case["model"], task.pairs, task.max_length, bench.device)
    expected = cache(partial(peers.reference, case["model"], items, task.pairs, task.max_length, bench.device))

    def ready(name: str) -> Ready:
        peer = peers.peer(name, *of_peer, case["dtype"])
        step = partial(peer.encode, items) if case["from"] == "strings" else peer.tokenized(items)
        return Ready([step], wrong(step(), expected(), split(name, case["dtype"])[1]), host=True)

    work = Work(tokens=_tokens(case["model"], items, task), sequences=len(items))
    row = bench.steps("inference", case, {name: partial(ready, name) for name in names(case, bench)}, work)
    assert bench.measure or not any(map(is_error, row.failures.values())), row.failures


def wrong(found: peers.Result, expected: peers.Result, precision: str) -> str | None:
    """How results differ from float32's, or None if by no more than a precision may."""
    if found.shape != expected.shape:
        return f"results are {found.shape}, not {expected.shape}"
    lost = 1 - float(peers.cosines(found, expected).min())
    return None if lost <= TOLERANCE[precision] else f"a cosine of {1 - lost:.6f} with float32's"


def _tokens(model: str, items: peers.Items, task: texts.Task) -> int:
    tokenizer = AutoTokenizer.from_pretrained(exports.checkpoint(model, task.pairs))
    columns = map(list, zip(*items, strict=True)) if task.pairs else [list(items)]
    return sum(map(len, tokenizer(*columns, truncation=True, max_length=task.max_length)["input_ids"]))
