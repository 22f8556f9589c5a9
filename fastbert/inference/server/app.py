"""The endpoints."""

import asyncio
import contextlib
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fastbert.inference.server import openai, tei
from fastbert.inference.server.refusals import CLOSING, FAILED, NO_METHOD, NO_PATH, Refusal
from fastbert.inference.server.service import Service

_GONE = 499  # nginx's status for a client that went away: nobody gets it, but it is counted
Handler = Callable[[Service, Request, bytes], Awaitable[Any]]
Endpoint = Callable[[Request], Awaitable[Response]]

_POSTS: dict[str, Handler] = {
    "/v1/embeddings": openai.embeddings,
    "/embed": tei.embed,
    "/rerank": tei.rerank,
    "/predict": tei.predict,
    "/tokenize": tei.tokenize,
}
_GETS: dict[str, Callable[[Service, Request], Any]] = {
    "/v1/models": lambda service, request: openai.models(service),
    "/v1/models/{name:path}": lambda service, request: openai.model(service, request.path_params["name"]),
    "/info": lambda service, request: tei.info(service),
}


def application(service: Service, on_start: Callable[[], None]) -> Starlette:
    """An ASGI application; `on_start` is called when it can be asked."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        on_start()
        yield
        service.close()

    async def health(request: Request) -> Response:
        return Response(status_code=503 if service.closing or not await service.healthy() else 200)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reason, what = (NO_PATH, "path") if error.status_code == 404 else (NO_METHOD, "method")
        refusal = Refusal(reason, f"no such {what}: {request.method} {request.url.path}")
        return _refused(request, refusal, error.headers)

    posts = [Route(path, _post(service, path, handler), methods=["POST"]) for path, handler in _POSTS.items()]
    gets = [Route(path, _get(service, handler), methods=["GET"]) for path, handler in _GETS.items()]
    # Whoever probes and scrapes has no key.
    free = [Route("/health", health, methods=["GET"]), Route("/metrics", metrics, methods=["GET"])]
    return Starlette(routes=[*posts, *gets, *free], lifespan=lifespan, exception_handlers={HTTPException: no_route})


def _post(service: Service, path: str, handler: Handler) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        start = time.perf_counter()
        try:
            service.admit(request)
            response = _json(200, await handler(service, request, await service.body(request)))
        except Refusal as refusal:
            response = _refused(request, refusal)
        except ClientDisconnect:
            service.metrics.disconnects.inc()
            response = Response(status_code=_GONE)
        except asyncio.CancelledError:  # the server has waited long enough
            response = _refused(request, Refusal(CLOSING, "the server has stopped"))
        except Exception as error:
            traceback.print_exception(error)
            response = _refused(request, Refusal(FAILED, "the server failed; its log says why"))
        service.metrics.request(path, response.status_code, start)
        return response

    return endpoint


def _get(service: Service, handler: Callable[[Service, Request], Any]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        try:
            service.admit(request)
            return _json(200, handler(service, request))
        except Refusal as refusal:
            return _refused(request, refusal)

    return endpoint


def _json(status: int, content: Any, headers: dict[str, str] | None = None) -> Response:
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, media_type="application/json")


def _refused(request: Request, refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
    dialect = openai if request.url.path.startswith("/v1/") else tei
    headers = dict(headers or {})
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.reason.openai == 401:
        headers["WWW-Authenticate"] = "Bearer"
    status, content = dialect.refusal(refusal)
    return _json(status, content, headers)
