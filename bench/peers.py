"""Engines that turn texts into vectors, or pairs into scores: fastbert's, sentence-transformers, and other runtimes.

All have as many threads as PyTorch. Those that need padding get texts sorted by tokens in batches of 32, as
sentence-transformers has them, and a host of nothing but tokenizers and NumPy.

Dimension key:  B texts   L padded length   N hidden size
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers

import fastbert
from bench import exports
from bench.bench_model import prefer_cudnn
from bench.harness import NotApplicableError
from bench.record import split
from bench.rivals import installed
from fastbert.errors import InputError

BATCH = 32
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Items = Sequence[str] | Sequence[tuple[str, str]]
Result = npt.NDArray[np.float32]  # (B, N) vectors, or (B,) scores
Step = Callable[[], Result]


class Peer(Protocol):
    def encode(self, items: Items) -> Result:
        """End to end."""

    def tokenized(self, items: Items) -> Step:
        """Without tokenisation, which is done here."""


class Fastbert:
    def __init__(
        self, folder: Path, pairs: bool, max_length: int, device: str, *, precision: str, graphs: bool = False
    ) -> None:
        kind = _ours("Reranker" if pairs else "Embedder")
        try:
            options = {"dtype": precision, "device": device, "max_length": max_length}
            self.engine = kind.from_pretrained(str(folder), **options)
        except InputError as error:
            if precision in DTYPES:
                raise
            raise NotApplicableError(f"has no {precision}") from error
        if graphs:
            _ours("graphs")(self.engine.model)
        self._pairs = pairs

    def encode(self, items: Items) -> Result:
        return self.engine.score_pairs(items) if self._pairs else self.engine.encode(items)

    def tokenized(self, items: Items) -> Step:
        tokens = self.engine.tokenize(items)
        return partial(self.engine.results if self._pairs else self.engine.encode_tokens, tokens)


def _ours(name: str) -> Any:
    try:
        return getattr(fastbert, name)
    except AttributeError as error:
        raise NotApplicableError(f"fastbert.{name} is not here") from error


class SentenceTransformers:
    """As it comes, or patched by fastbert, compiled, or with another attention."""

    def __init__(
        self,
        folder: Path,
        pairs: bool,
        max_length: int,
        device: str,
        *,
        precision: str,
        attention: str = "sdpa",
        cudnn: bool = False,
        patch: bool = False,
        compile: bool = False,
    ) -> None:
        kind = installed("sentence_transformers", "CrossEncoder" if pairs else "SentenceTransformer")
        if attention == "flash_attention_2" and not transformers.utils.is_flash_attn_2_available():
            installed("kernels", "get_kernel")
        options = {"dtype": DTYPES[precision], "attn_implementation": attention}
        self.model = kind(str(folder), device=device, model_kwargs=options)
        self.model.max_seq_length = max_length
        if patch:
            fastbert.patch(self.model)
        if compile:
            torch._dynamo.reset()
            self.model[0].auto_model.compile(dynamic=True)
        call = self.model.predict if pairs else self.model.encode
        call = partial(call, batch_size=BATCH, show_progress_bar=False)
        self.encode: Callable[[Items], Result] = prefer_cudnn(call) if cudnn else call
        self._forward = prefer_cudnn(self.model.__call__) if cudnn else self.model
        self._output = "scores" if pairs else "sentence_embedding"

    def tokenized(self, items: Items) -> Step:
        order = sorted(range(len(items)), key=lambda i: -len("".join(items[i])))
        batches = [[items[i] for i in order[at : at + BATCH]] for at in range(0, len(items), BATCH)]
        features = [self.model.preprocess(batch) for batch in batches]
        return partial(self._forward_all, features, np.argsort(order))

    @torch.inference_mode()
    def _forward_all(self, features: Sequence[Any], places: npt.NDArray[np.int64]) -> Result:
        outputs = []
        for of_batch in features:
            on_device = {name: t.to(self.model.device) if torch.is_tensor(t) else t for name, t in of_batch.items()}
            outputs.append(self._forward(on_device)[self._output].float())
        found = torch.cat(outputs).cpu().numpy()
        return _activated(found)[places] if self._output == "scores" else found[places]


class Padded:
    """Another runtime, behind a host that tokenises, sorts and pads."""

    def __init__(self, folder: Path, pairs: bool, max_length: int) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._pairs = pairs

    def encode(self, items: Items) -> Result:
        return self.tokenized(items)()

    def tokenized(self, items: Items) -> Step:
        encodings = self._tokenizer.encode_batch_fast(list(items))
        order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i].ids))
        batches = [[encodings[i] for i in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
        return partial(self._run_all, batches, np.argsort(order))

    def _run_all(self, batches: Sequence[Sequence[Any]], places: npt.NDArray[np.int64]) -> Result:
        found = np.concatenate([self._results(batch) for batch in batches])
        return found[places]

    def _results(self, batch: Sequence[Any]) -> Result:
        inputs = {name: _padded([getattr(it, field) for it in batch]) for name, field in _FIELDS.items()}
        output = self.run(inputs)
        return _activated(output) if self._pairs else _pooled(output, inputs["attention_mask"])

    def run(self, inputs: dict[str, npt.NDArray[np.int64]]) -> Result:
        """Hidden states (B, L, N), or logits (B, 1)."""
        raise NotImplementedError


_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class OnnxRuntime(Padded):
    def __init__(self, model: str, folder: Path, pairs: bool, max_length: int, precision: str) -> None:
        super().__init__(folder, pairs, max_length)
        path = exports.onnx(model, pairs, precision)
        options = installed("onnxruntime", "SessionOptions")()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        kind = installed("onnxruntime", "InferenceSession")
        self._session = kind(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: dict[str, npt.NDArray[np.int64]]) -> Result:
        return self._session.run(None, inputs)[0]


class OpenVino(Padded):
    def __init__(self, model: str, folder: Path, pairs: bool, max_length: int, precision: str) -> None:
        super().__init__(folder, pairs, max_length)
        path = exports.openvino(model, pairs, "int8" if precision == "int8" else "fp32")
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        if precision != "int8":  # whose other operators are in what OpenVINO finds best here
            properties["INFERENCE_PRECISION_HINT"] = {"fp32": "f32"}.get(precision, precision)
        self._compiled = installed("openvino", "Core")().compile_model(str(path), "CPU", properties)

    def run(self, inputs: dict[str, npt.NDArray[np.int64]]) -> Result:
        return self._compiled(inputs)[0]


class CTranslate2(Padded):
    """Removes the padding itself, but for attention. Knows no classifiers: their last layer is NumPy's."""

    def __init__(self, model: str, folder: Path, pairs: bool, max_length: int, precision: str) -> None:
        super().__init__(folder, pairs, max_length)
        compute = {"fp32": "float32"}.get(precision, precision)
        path, threads = exports.ctranslate2(model, pairs), torch.get_num_threads()
        kind = installed("ctranslate2", "Encoder")
        self._encoder = kind(str(path), compute_type=compute, intra_threads=threads, inter_threads=1)
        if pairs:
            head = transformers.BertForSequenceClassification.from_pretrained(folder).classifier
            self._weight, self._bias = (t.detach().numpy() for t in (head.weight, head.bias))

    def _results(self, batch: Sequence[Any]) -> Result:
        ids, types = ([getattr(it, field) for it in batch] for field in ("ids", "type_ids"))
        output = self._encoder.forward_batch(ids, token_type_ids=types)
        if self._pairs:
            return _activated(np.asarray(output.pooler_output) @ self._weight.T + self._bias)
        mask = _padded([it.attention_mask for it in batch])
        return _pooled(np.asarray(output.last_hidden_state), mask)


RUNTIMES = {"ONNX Runtime": OnnxRuntime, "OpenVINO": OpenVino, "CTranslate2": CTranslate2}


@lru_cache(maxsize=20)  # of one model at one length
def peer(name: str, model: str, pairs: bool, max_length: int, device: str, dtype: str) -> Peer:
    """An engine by its name, which says its precision where that is not `dtype`.

    Raises:
        NotApplicableError: if it is not here, or has no such thing.
    """
    library, precision = split(name, dtype)
    kind, _, variant = library.partition(", ")
    folder = exports.checkpoint(model, pairs)
    if kind in RUNTIMES:
        return RUNTIMES[kind](model, folder, pairs, max_length, precision)
    made = partial(Fastbert if kind == "fastbert" else SentenceTransformers, folder, pairs, max_length, device)
    return made(precision=precision, **VARIANTS[variant])


VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "graphs": {"graphs": True},
    "patched": {"patch": True},
    "compiled": {"compile": True},
    "eager": {"attention": "eager"},
    "cuDNN": {"cudnn": True},
    "FlashAttention-2": {"attention": "flash_attention_2"},
}


@torch.inference_mode()
def reference(model: str, items: Items, pairs: bool, max_length: int, device: str) -> Result:
    """By transformers in float32, from the model's own files."""
    folder = exports.checkpoint(model, pairs)
    kind = transformers.AutoModelForSequenceClassification if pairs else transformers.AutoModel
    plain = kind.from_pretrained(folder).to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    order = sorted(range(len(items)), key=lambda i: -len("".join(items[i])))
    found = []
    for at in range(0, len(order), BATCH):
        batch = [items[i] for i in order[at : at + BATCH]]
        texts = zip(*batch, strict=True) if pairs else [batch]
        options = {"truncation": True, "max_length": max_length, "padding": True, "return_tensors": "pt"}
        inputs = tokenizer(*map(list, texts), **options).to(device)
        output = plain(**inputs)
        if pairs:
            found.append(_activated(output.logits.cpu().numpy()))
        else:
            found.append(_pooled(output.last_hidden_state.cpu().numpy(), inputs["attention_mask"].cpu().numpy()))
    return np.concatenate(found)[np.argsort(order)]


def cosines(found: Result, expected: Result) -> npt.NDArray[np.float64]:
    """Of each vector with the expected one; of scores, which are one vector, about their mean."""
    a, b = (it.astype(np.float64) for it in (found, expected))
    if expected.ndim == 1:
        a, b = (it[None] - it.mean() for it in (a, b))
    a, b = (it / np.linalg.norm(it, axis=-1, keepdims=True) for it in (a, b))
    return (a * b).sum(-1)


def _padded(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """(B, L), with zeros behind."""
    padded_BL = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, values in zip(padded_BL, rows, strict=True):
        row[: len(values)] = values
    return padded_BL


def _pooled(hidden_BLN: Result, mask_BL: npt.NDArray[np.int64]) -> Result:
    """Means over real tokens, of length 1."""
    sums_BN = np.matmul(mask_BL[:, None].astype(np.float32), hidden_BLN)[:, 0]
    return sums_BN / np.linalg.norm(sums_BN, axis=-1, keepdims=True)


def _activated(logits: Result) -> Result:
    """(B,) from (B, 1) or (B,): a sigmoid, as a cross-encoder of one label has it."""
    return 1 / (1 + np.exp(-logits.reshape(len(logits))))
