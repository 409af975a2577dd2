"""The command `python -m sasrec serve`."""

import argparse
import contextlib
import socket
import sys
from collections.abc import Sequence

import uvicorn

from sasrec.deploy.recommender import ArtefactError
from sasrec.deploy.service import Service, load
from sasrec.errors import UserError
from sasrec.mapping import within

GRACE_SECONDS = 10
# Connections that wait to be taken.
BACKLOG = 2048


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, one for each address of the host (localhost may have two). Raises UserError where there are none."""
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a protocol of 0 asyncio would not know that it is TCP, and small answers would wait for acknowledgements.
        for family, kind, protocol, _, (own, given, *more) in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Of a port that the system chooses, all have the first one's.
            listener.bind((own, given or (listeners[0].getsockname()[1] if listeners[1:] else 0), *more))
            listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        for listener in listeners:
            listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}:{port} ({reason}); give another --port or --host") from None
    return listeners


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sasrec serve", description="Serve exported models over HTTP.")
    parser.add_argument("--model", action="append", required=True, help="folder of an exported model; several may be given")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="threads of a product")
    given = parser.parse_args(arguments)
    try:
        within("--port", given.port, 0, 65535)
        within("--threads", given.threads, 1)
        models = load(given.model, given.threads)
        listeners = listen(given.host, given.port)
    except (ArtefactError, UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    host = f"[{given.host}]" if ":" in given.host else given.host
    print(f"serving {', '.join(models)} at http://{host}:{listeners[0].getsockname()[1]}/", flush=True)
    config = uvicorn.Config(
        Service(models).app(),
        backlog=BACKLOG,
        log_level="warning",
        access_log=False,
        limit_concurrency=1024,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(listeners)
    return 0
