"""A server that listens until it is told to stop."""

import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from fastbert.errors import InputError
from fastbert.inference.server.app import application
from fastbert.inference.server.service import Service

_GRACE = 25  # seconds in which what has come is answered; what stops processes often kills after 30
_BACKLOG = 1024  # connections that wait to be taken
_SWITCH = 5e-4  # seconds until a thread gives the GIL away: in 5e-3, Python's own, a batch could have begun
_KEEP_ALIVE = 75  # seconds; above those of load balancers, which must not find a connection closed


def bound(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet; `port` 0 is a free one.

    Raises:
        InputError: if there is no such address, or it is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    return listener


def run(service: Service, listener: socket.socket, on_start: Callable[[], None]) -> None:
    """Answers until SIGTERM or SIGINT; then what has come is answered, and new requests are turned away.

    Args:
        on_start: called when requests can be made.
    """
    server = Server(service, listener, on_start)
    # uvicorn raises its signals again when it is done: with these handlers the process ends with status 0.
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        server.run(sockets=[listener])
    finally:
        sys.setswitchinterval(interval)
        for number, handler in before.items():
            signal.signal(number, handler)


class Server(uvicorn.Server):
    """uvicorn's, on a bound socket."""

    def __init__(self, service: Service, listener: socket.socket, on_start: Callable[[], None]) -> None:
        def start() -> None:
            listener.listen(_BACKLOG)
            on_start()

        config = uvicorn.Config(
            application(service, start),
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_GRACE,
            backlog=_BACKLOG,
        )
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.closing = True
        super().handle_exit(sig, frame)
