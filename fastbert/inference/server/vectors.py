"""Vectors, as both dialects ask for them.

Dimension key:  B texts   N elements
"""

import numpy as np
from starlette.requests import Request

from fastbert.inference.server.batching import Results
from fastbert.inference.server.fields import Fields
from fastbert.inference.server.refusals import FIELD, Refusal
from fastbert.inference.server.service import Service

VECTOR_FIELDS = ("dimensions", "truncate", "prompt_name")


async def vectors(service: Service, request: Request, fields: Fields, name: str) -> tuple[Results, int]:
    """(B, N) of the texts or token ids in the field `name`, and the tokens of all; cut to `dimensions` and scaled to
    length 1, where that is asked for."""
    service.must_be("embedder")
    dimensions = fields.integer("dimensions")
    if dimensions is not None and not 1 <= dimensions <= service.width:
        what = f"dimensions must be in [1, {service.width}], but is {dimensions}"
        raise Refusal(FIELD, what, param="dimensions")
    items = fields.texts_or_ids(name)
    prompt = fields.string("prompt_name")
    if prompt is not None and isinstance(items[0], list):
        raise Refusal(FIELD, "prompt_name is for texts, not for token ids", param="prompt_name")
    truncate = fields.boolean("truncate", True)
    vectors_BN, tokens = await service.results(request, items, truncate=truncate, prompt=prompt)
    return vectors_BN if dimensions is None else unit(vectors_BN[:, :dimensions]), tokens


def unit(vectors_BN: Results) -> Results:
    """Scaled to length 1; zeros stay."""
    unit_BN: Results = vectors_BN / np.maximum(np.linalg.norm(vectors_BN, axis=1, keepdims=True), np.float32(1e-12))
    return unit_BN
