"""Hugging Face's text-embeddings-inference: https://huggingface.github.io/text-embeddings-inference

Dimension key:  B texts   N elements, or labels
"""

from typing import Any

import numpy as np
import torch
from starlette.requests import Request

import fastbert
from fastbert.inference.encoding import backend_of
from fastbert.inference.server.batching import Results
from fastbert.inference.server.fields import Fields
from fastbert.inference.server.refusals import EMPTY, FIELD, OTHER_KIND, Refusal
from fastbert.inference.server.service import Service
from fastbert.inference.server.vectors import VECTOR_FIELDS, unit, vectors


def refusal(refusal: Refusal) -> tuple[int, dict[str, Any]]:
    return refusal.reason.tei, {"error": refusal.message, "error_type": refusal.reason.tei_type}


async def embed(service: Service, request: Request, body: bytes) -> Results:
    fields = Fields(body, ("inputs", "normalize", "truncation_direction", *VECTOR_FIELDS))
    _only_right(fields)
    normalize = fields.boolean("normalize", True)
    vectors_BN, _ = await vectors(service, request, fields, "inputs")
    return unit(vectors_BN) if normalize else vectors_BN


async def rerank(service: Service, request: Request, body: bytes) -> list[dict[str, Any]]:
    """The texts by their score, best first."""
    service.must_be("reranker")
    fields = Fields(body, ("query", "texts", "raw_scores", "return_text", "truncate", "truncation_direction"))
    _only_right(fields)
    query, texts = fields.needed_string("query"), fields.texts("texts")
    raw, with_text = fields.boolean("raw_scores", False), fields.boolean("return_text", False)
    logits_BN, _ = await service.results(
        request, [(query, text) for text in texts], truncate=fields.boolean("truncate", True)
    )
    scores_B = (logits_BN if raw else torch.from_numpy(logits_BN).sigmoid().numpy())[:, 0]
    order = np.argsort(-scores_B, kind="stable").tolist()
    return [
        {"index": i, **({"text": texts[i]} if with_text else {}), "score": score}
        for i, score in zip(order, scores_B[order].tolist(), strict=True)
    ]


async def predict(service: Service, request: Request, body: bytes) -> list[Any]:
    """All labels of a text with their scores, best first; a list of such lists for a list of texts."""
    service.must_be("reranker", "classifier")
    fields = Fields(body, ("inputs", "raw_scores", "truncate", "truncation_direction"))
    _only_right(fields)
    items, one = _texts_or_pairs(fields)
    raw = fields.boolean("raw_scores", False)
    logits_BN, _ = await service.results(request, items, truncate=fields.boolean("truncate", True))
    labels = service.served.labels
    scores_BN = logits_BN if raw else service.served.scoring(torch.from_numpy(logits_BN)).numpy()
    predictions = [
        [{"score": score, "label": labels[i]} for i, score in sorted(enumerate(row), key=lambda pair: -pair[1])]
        for row in scores_BN.tolist()
    ]
    return predictions[0] if one else predictions


async def tokenize(service: Service, request: Request, body: bytes) -> list[list[dict[str, Any]]]:
    fields = Fields(body, ("inputs", "add_special_tokens"))
    texts = fields.texts_or_ids("inputs")
    if isinstance(texts[0], list):
        raise Refusal(FIELD, "inputs must be a string or a list of strings", param="inputs")
    special = fields.boolean("add_special_tokens", True)
    backend = backend_of(service.served.engine.tokenizer)
    if backend is None:
        raise Refusal(OTHER_KIND, f"the tokenizer of {service.served.name} does not say where its tokens stand")

    def work() -> list[list[dict[str, Any]]]:
        return [
            [
                {"id": token, "text": text, "special": bool(mark), "start": start, "stop": stop}
                for token, text, mark, place in zip(e.ids, e.tokens, e.special_tokens_mask, e.offsets, strict=True)
                for start, stop in [(None, None) if mark else place]
            ]
            for e in backend.encode_batch(texts, add_special_tokens=special)
        ]

    with service.place(len(texts)):
        return await service.tokenizing(work)


def info(service: Service) -> dict[str, Any]:
    served, limits = service.served, service.limits
    engine = served.engine
    labels = {str(i): label for i, label in enumerate(served.labels)}
    about = {
        "embedder": {"embedding": {"dimensions": service.width}},
        "reranker": {"reranker": {"id2label": labels}},
        "classifier": {"classifier": {"id2label": labels}},
    }
    return {
        "model_id": served.name,
        "model_dtype": str(engine.model.dtype).removeprefix("torch."),
        "model_type": about[served.kind],
        "max_input_length": engine.max_length,
        "max_batch_tokens": engine.batch_tokens,
        "max_client_batch_size": limits.texts,
        "max_queue_texts": limits.queue,
        "auto_truncate": True,
        "version": f"fastbert {fastbert.__version__}",
    }


def _only_right(fields: Fields) -> None:
    fields.one_of("truncation_direction", ("right", "Right"))


def _texts_or_pairs(fields: Fields) -> tuple[list[Any], bool]:
    """What is to be predicted, and whether it is one text or pair: a string, [string, string], which is a pair, or
    [[string], [string, string], ...]."""
    inputs = fields.needed("inputs")
    one = isinstance(inputs, str) or (isinstance(inputs, list) and isinstance(inputs[0], str))
    rows = [[inputs] if isinstance(inputs, str) else inputs] if one else inputs
    what = "inputs must be a string, a pair [string, string], or a list [[string], [string, string], ...]"
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise Refusal(FIELD, what, param="inputs")
    for row in rows:
        if not row:
            raise Refusal(EMPTY, "a text of inputs is empty: []", param="inputs")
        if len(row) > 2 or not all(isinstance(text, str) for text in row):
            raise Refusal(FIELD, what, param="inputs")
    return [tuple(row) if len(row) == 2 else row[0] for row in rows], one
