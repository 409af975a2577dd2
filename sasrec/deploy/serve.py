"""The command `python -m sasrec serve`."""

import argparse
import sys
from collections.abc import Sequence

import uvicorn

from sasrec.deploy.recommender import ArtefactError
from sasrec.deploy.service import Service, load

GRACE_SECONDS = 10


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sasrec serve", description="Serve exported models over HTTP.")
    parser.add_argument("--model", action="append", required=True, help="folder of an exported model; several may be given")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="threads of a product")
    given = parser.parse_args(arguments)
    try:
        models = load(given.model, given.threads)
    except ArtefactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"serving {', '.join(models)} at http://{given.host}:{given.port}/", flush=True)
    uvicorn.run(
        Service(models).app(),
        host=given.host,
        port=given.port,
        log_level="warning",
        access_log=False,
        limit_concurrency=1024,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return 0
