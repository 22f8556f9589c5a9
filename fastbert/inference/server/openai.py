"""OpenAI's embeddings: https://platform.openai.com/docs/api-reference/embeddings

Dimension key:  B texts   N elements
"""

import base64
from typing import Any

from starlette.requests import Request

from fastbert.inference.server.fields import Fields
from fastbert.inference.server.refusals import OTHER_MODEL, Refusal
from fastbert.inference.server.service import Service
from fastbert.inference.server.vectors import VECTOR_FIELDS, vectors

_FIELDS = ("input", "model", "encoding_format", "user", *VECTOR_FIELDS)


def refusal(refusal: Refusal) -> tuple[int, dict[str, Any]]:
    reason = refusal.reason
    error = {
        "message": refusal.message,
        "type": reason.openai_type,
        "param": refusal.param,
        "code": reason.openai_code,
    }
    return reason.openai, {"error": error}


async def embeddings(service: Service, request: Request, body: bytes) -> dict[str, Any]:
    service.must_be("embedder")
    fields = Fields(body, _FIELDS)
    model = fields.needed_string("model")
    if model != service.served.name:
        raise Refusal(OTHER_MODEL, f"there is no model {model!r}, but {service.served.name!r}", param="model")
    as_base64 = fields.one_of("encoding_format", ("float", "base64")) == "base64"
    fields.string("user")
    vectors_BN, tokens = await vectors(service, request, fields, "input")
    rows = [base64.b64encode(row).decode() for row in vectors_BN.astype("<f4")] if as_base64 else vectors_BN
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def models(service: Service) -> dict[str, Any]:
    return {"object": "list", "data": [_model(service)]}


def model(service: Service, name: str) -> dict[str, Any]:
    if name != service.served.name:
        raise Refusal(OTHER_MODEL, f"there is no model {name!r}, but {service.served.name!r}", param="model")
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.served.name, "object": "model", "created": service.started, "owned_by": "fastbert"}
