"""fastbert serve: a model behind HTTP."""

from typing import Annotated

import typer

from fastbert.commands.options import BatchTokensOption, DeviceOption, Model, Precision, PrecisionOption, torch_device
from fastbert.errors import require
from fastbert.terminal import counted, note


def serve(
    model: Model,
    *,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model.", show_default="its directory's, or the hub's")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="FASTBERT_API_KEY", help="What requests have to bring: Authorization: Bearer KEY."),
    ] = None,
    batch_tokens: BatchTokensOption = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a text is cut to.", show_default="what the model takes")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Texts accepted and not yet answered; then 429.")] = 8192,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts in a request.")] = 2048,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 4 << 20,
    dtype: PrecisionOption = Precision.fp32,
    device: DeviceOption = None,
) -> None:
    """Serve a model: OpenAI's /v1/embeddings, and /embed, /rerank and /predict of text-embeddings-inference."""
    require("orjson", "prometheus_client", "starlette", "uvicorn", to="serve a model")
    from fastbert.inference.server.models import load
    from fastbert.inference.server.run import bound, run
    from fastbert.inference.server.service import Limits, Service

    limits = Limits(queue=max_queue, texts=max_texts, body=max_body)
    with bound(host, port) as listener:
        served = load(
            model,
            name=name,
            dtype=dtype.value,
            device=torch_device(device),
            batch_tokens=batch_tokens,
            max_length=max_length,
        )
        service = Service(served, limits, api_key=api_key)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        run(service, listener, lambda: note(f"{served.name}, {served.kind}, is ready at {url}"))
    note(f"stopped after {counted(service.metrics.answered, 'request')}")
