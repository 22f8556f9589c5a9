"""Runs with invented figures, for the report, its pictures and the comparison of runs."""

import random
from typing import Any

from bench import (
    bench_attention,
    bench_breakdown,
    bench_cross_entropy,
    bench_embedding,
    bench_ffn,
    bench_inference,
    bench_layer_norm,
    bench_memory,
    bench_model,
    bench_quality,
    bench_roof,
)
from bench.record import OURS, Row, Run, Timing, Work, split
from bench.shapes import MODELS, batch_of, tokens_of

SDPA = "transformers SDPA"
CPU = "INVENTED(R) CPU Platinum 8481C Processor @ 2.70GHz"
PEAK = {"cuda": {"bfloat16": 7.6e14, "float16": 7.5e14, "float32": 5e13}, "cpu": {"float32": 2.4e11, "bfloat16": 9e10}}
COPY = {"cuda": 4.1e12, "cpu": 1.9e10}


def empty_run(device: str = "cpu", started: str = "2030-01-02T03:04:05+00:00", **changes: Any) -> Run:
    gpu = {"gpu": "INVENTED GPU", "memory_bytes": 150_000_000_000} if device == "cuda" else {"gpu": None}
    run = Run(
        machine={"cpu": CPU, "threads": 2, **gpu},
        versions={"python": "3.12.1", "torch": "2.13.0", "triton": "3.7.1", "transformers": "5.23.0"},
        commit="abc1234",
        command="pytest bench --benchmark",
        started=started,
        clocks={"before": None, "after": None},
        complete=True,
    )
    return Run(**{**vars(run), **changes})


def timing(seconds: float, spread: float = 0.02, peak_bytes: int | None = None) -> Timing:
    return Timing(seconds, (1 - spread) * seconds, (1 + spread) * seconds, 20, "events", peak_bytes)


def invented_run(device: str) -> Run:
    """Every case of every bench, timed by a random generator."""
    run, rng = empty_run(device), random.Random(0)
    peak, copy = PEAK[device], COPY[device]

    def least(work: Work, dtype: str) -> float:
        rate = peak["bfloat16" if dtype == "autocast" else dtype]
        return max(work.bytes / copy, work.flops / rate)

    def add(bench: str, case: dict[str, Any], work: Work, shares: dict[str, float], **failures: str) -> None:
        seconds = {name: least(work, case.get("dtype", "float32")) / share for name, share in shares.items()}
        timings = {name: timing(s * rng.uniform(0.97, 1.03)) for name, s in seconds.items()}
        run.rows.append(Row(bench, case, work, timings, failures))

    def unique(module: Any) -> list[dict[str, Any]]:
        cases = [*getattr(module, "GOALS", {}).get(device, []), *module.CASES[device]]
        return [case for i, case in enumerate(cases) if case not in cases[:i]]

    for case in unique(bench_roof):
        if case["what"] == "copy":
            add("roof", case, Work(bytes=2 * case["bytes"]), {"PyTorch": 1.0})
        elif case["what"] == "launch":
            run.rows.append(Row("roof", case, timings={"PyTorch": timing(1e-3 if case["how"] == "eager" else 3e-4)}))
        else:
            M, K, N = case["tokens"], case["in"], case["out"]
            work = Work(flops=2 * M * N * K, products=((case["pass"], M, K, N),))
            add("roof", case, work, {"PyTorch": 1.0 if case["pass"] == "square" else rng.uniform(0.7, 0.9)})
    for case in unique(bench_attention):
        sequences = tokens_of(case["lengths"], case["tokens"])
        H, D, itemsize = case["heads"], case["head_dim"], 4 if case["dtype"] == "float32" else 2
        tensors, products = (4, 2) if case["pass"] == "forward" else (8, 5)
        moved = tensors * sum(sequences) * H * D * itemsize
        work = Work(moved, 2 * products * H * D * sum(n * n for n in sequences))
        others = {"PyTorch": 0.07, "torch.compile": 0.12, "SDPA efficient": 0.25, "SDPA cuDNN": 0.4, "flash-attn": 0.5}
        others = others if device == "cuda" else {"PyTorch": 0.2, "SDPA": 0.5}
        add("attention", case, work, {OURS: rng.uniform(0.45, 0.9), **others}, varlen_attn="has no dropout")
    for module, bench in ((bench_layer_norm, "layer_norm"), (bench_embedding, "embedding")):
        for case in unique(module):
            itemsize = 4 if case["dtype"] == "float32" else 2
            tensors = 3 if case["pass"] == "forward" else 5
            work = Work(bytes=tensors * case["tokens"] * case["hidden"] * itemsize)
            add(bench, case, work, {OURS: rng.uniform(0.75, 0.97), "PyTorch": 0.24, "torch.compile": 0.7})
    for case in unique(bench_ffn):
        M, K, N = case["tokens"], case["hidden"], 4 * case["hidden"]
        passes = ("forward",) if case["pass"] == "forward" else ("dgrad", "wgrad")
        work = Work(flops=2 * M * K * N * len(passes), products=tuple((name, M, K, N) for name in passes))
        add("ffn", case, work, {OURS: rng.uniform(0.65, 0.85), "PyTorch": 0.6, "torch.compile": 0.66})
    for case in unique(bench_cross_entropy):
        n, K, V = case["labelled"], case["hidden"], case["vocabulary"]
        passes = ("forward",) if case["pass"] == "forward" else ("forward", "dgrad", "wgrad")
        work = Work(flops=2 * n * K * V * len(passes), products=tuple((name, n, K, V) for name in passes))
        add("cross_entropy", case, work, {OURS: rng.uniform(0.5, 0.7), "PyTorch": 0.3, "Liger": 0.45})
    for case in unique(bench_model):
        layers, hidden, _ = MODELS[case["model"].split()[0]]
        sequences = batch_of(case["lengths"], case["batch"], case["S"])
        flops = sum((24 * hidden * hidden + 4 * n * hidden) * n * layers for n in sequences)
        training = case["step"] == "training"
        work = Work(flops=flops * (3 if training else 1), tokens=sum(sequences), sequences=len(sequences))
        waste = sum(sequences) / (case["batch"] * case["S"])
        small = 1 / (1 + 2 / case["batch"])
        shares = {
            OURS: 0.6 * small,
            SDPA: 0.42 * waste * small,
            "transformers eager": 0.3 * waste * small,
            "reference": 0.2 * small,
            "transformers SDPA, compiled": 0.5 * waste * small,
            "transformers SDPA, compiled dynamic": 0.47 * waste * small,
        }
        if device == "cuda" and case["batch"] <= 8:
            shares |= {f"{OURS}, CUDA graph": 0.65 * small**0.7, f"{SDPA}, CUDA graph": 0.5 * small**0.7}
        if training:
            del shares["reference"]
        add("model", case, work, shares)
    for case in unique(bench_breakdown):
        ours = case["provider"] == OURS
        total = (2e-4 if case["batch"] == 1 else 0.2 if case["step"] == "training" else 0.06) * (1 if ours else 2.4)
        weights = dict.fromkeys((*bench_breakdown.PARTS, "other", "gaps"), 0.04 if ours else 0.08)
        weights["matrix products"], weights["attention"], weights[bench_breakdown.IN_ONE] = 0.7, 0.12, 0.0
        if case["step"] == "inference":
            weights["optimizer"] = weights["cross-entropy"] = weights["dropout"] = 0.0
        values = {part: total * weight / sum(weights.values()) for part, weight in weights.items()}
        run.rows.append(Row("breakdown", case, values=values, unit="s"))
    for case in unique(bench_inference):
        run.rows.append(engine_row(case, device, rng))
    for case in unique(bench_quality):
        names = [OURS, f"{OURS} int8", "sentence-transformers", "OpenVINO int8", "CTranslate2 int8"]
        values = {name: 86.72 - (0.1 if name.endswith("int8") else 0) for name in names}
        run.rows.append(Row("quality", case, values=values, unit="%"))
    for case in unique(bench_memory):
        values = {SDPA: 36.1 * case["hidden"], OURS: (32.1 if case["padding"] == "none" else 16.0) * case["hidden"]}
        run.rows.append(Row("memory", case, values=values, unit="B per token and layer"))
    return run


_LIBRARIES = {"fastbert": 0.5, "OpenVINO": 0.7, "ONNX Runtime": 0.8, "CTranslate2": 0.66}
_PRECISIONS = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5, "int8": 0.27}


def engine_row(case: dict[str, Any], device: str, rng: random.Random, **seconds: float) -> Row:
    """A case of inference: each provider's time by its library and precision, or as given."""
    names = [OURS, *(f"{OURS} {it}" for it in bench_inference.PRECISIONS[device]), *bench_inference.OTHERS[device]]
    timings = {}
    for name in names:
        library, precision = split(name, case["dtype"])
        taken = _LIBRARIES.get(library, 1.0) * _PRECISIONS[precision] * rng.uniform(0.8, 1.2)
        timings[name] = timing(seconds.get(name, 2.0 * taken))
    work = Work(tokens=50 * case["texts"], sequences=case["texts"])
    return Row("inference", case, work, timings, {"sentence-transformers, compiled": "is not here"})


def model_case(**changes: Any) -> dict[str, Any]:
    return bench_model.case_of("base", "inference", 8, 384, "squad", "float32") | changes


def model_row(seconds: dict[str, float], tokens: int = 1000, **changes: Any) -> Row:
    work = Work(flops=10, tokens=tokens, sequences=8)
    return Row("model", model_case(**changes), work, {name: timing(s) for name, s in seconds.items()})


def small_run() -> Run:
    """A copy at 4 GB/s, products at 2 TFLOP/s; LayerNorm at a half of it, attention at a quarter."""
    norm = {"pass": "forward", "tokens": 10, "hidden": 384, "dtype": "float32", "dropout": 0.0}
    square = {"what": "product", "pass": "square", "tokens": 10, "in": 10, "out": 10, "dtype": "float32"}
    attention = {"pass": "backward", "tokens": 10, "heads": 2, "head_dim": 32, "lengths": "128", "dtype": "float32"}
    stock, copy, products = {"PyTorch": timing(1.0)}, Work(bytes=4 * 10**9), Work(flops=10**12)
    others = {"PyTorch": timing(3.0), "SDPA": timing(1.0)}
    rows = [
        Row("roof", {"what": "copy", "bytes": 2}, copy, stock),
        Row("roof", square, products, {"PyTorch": timing(0.5)}),
        Row("layer_norm", norm, Work(bytes=10**9), {**stock, OURS: timing(0.5, 0.1, 12_000_000)}),
        Row("layer_norm", norm | {"hidden": 768}, Work(bytes=10**9), stock, {OURS: "wrong: off"}),
        Row("attention", attention, Work(10**9, 10**12), {**others, OURS: timing(2.0)}, {"new": "absent"}),
    ]
    return empty_run(rows=rows)
