"""Exported models behind HTTP: POST /recommend, GET /search, /models, /health, /metrics, and a page at / to try them on.

A request is answered in the event loop itself: a recommendation takes less time than handing it to another thread would.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sasrec.deploy.recommender import Recommender

PAGE = Path(__file__).with_name("page.html")
KEYS = ("history", "ratings", "times", "k", "exclude_seen", "allow", "block", "model")
SUGGESTIONS = 12
# Upper ends of the histogram of /metrics, in seconds.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    """Of one request. What is beyond is refused with 413 (bytes), 408 (seconds until the body is there) or 422.
    Ratings and times are as long as the history or refused, so that they need no limits of their own."""

    body_bytes: int = 256 * 1024
    body_seconds: float = 10.0
    users: int = 256
    history: int = 2_000
    ids: int = 20_000  # in allow and in block
    k: int = 1_000


def refuse(status: int, message: str) -> HTTPException:
    return HTTPException(status, message)


class Metrics:
    """Counts of requests and their times, in the text format of Prometheus."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.buckets = [0] * len(BUCKETS)
        self.seconds, self.count = 0.0, 0
        self.unknown = self.by_popularity = self.users = 0

    def observe(self, seconds: float) -> None:
        self.seconds += seconds
        self.count += 1
        for i, end in enumerate(BUCKETS):
            self.buckets[i] += seconds <= end

    def text(self, more: dict[str, int] | None = None) -> str:
        lines = ["# TYPE sasrec_requests_total counter"]
        lines += [
            f'sasrec_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        lines.append("# TYPE sasrec_recommend_seconds histogram")
        ends = zip((*map(str, BUCKETS), "+Inf"), (*self.buckets, self.count), strict=True)
        lines += [f'sasrec_recommend_seconds_bucket{{le="{end}"}} {count}' for end, count in ends]
        lines += [f"sasrec_recommend_seconds_sum {self.seconds}", f"sasrec_recommend_seconds_count {self.count}"]
        counters = {"users": self.users, "unknown_ids": self.unknown, "answered_by_popularity": self.by_popularity}
        for name, count in (counters | (more or {})).items():
            lines += [f"# TYPE sasrec_{name}_total counter", f"sasrec_{name}_total {count}"]
        return "\n".join(lines) + "\n"


class Service:
    """models: by name; a request that names none is answered by the first."""

    def __init__(self, models: dict[str, Recommender], limits: Limits | None = None) -> None:
        self.models, self.limits, self.metrics = models, limits or Limits(), Metrics()
        first = next(iter(models.values()))
        # What a person types is looked for in titles, or in ids where there are none.
        self.names = [(original, title or original) for original, title in zip(first.ids, first.titles, strict=True)][1:]
        self.folded = [name.casefold() for _, name in self.names]
        self.page = PAGE.read_text(encoding="utf-8")

    def app(self) -> Starlette:
        routes = [
            Route("/", self.index),
            Route("/recommend", self.recommend, methods=["POST"]),
            Route("/search", self.search),
            Route("/models", self.list_models),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
        ]
        self.paths = {route.path for route in routes}
        return Starlette(routes=routes, exception_handlers={HTTPException: self.refused, Exception: self.failed})

    def _counted(self, request: Request, response: Response) -> Response:
        path = request.url.path if request.url.path in self.paths else "other"
        self.metrics.requests[path, response.status_code] += 1
        return response

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = {"error": error.detail}
        return self._counted(request, JSONResponse(body, error.status_code, headers=error.headers))

    async def failed(self, request: Request, error: Exception) -> Response:
        return self._counted(request, JSONResponse({"error": "internal error"}, 500))

    async def index(self, request: Request) -> Response:
        return self._counted(request, HTMLResponse(self.page, headers=HEADERS))

    async def health(self, request: Request) -> Response:
        return self._counted(request, JSONResponse({"status": "ok", "models": list(self.models)}))

    async def show_metrics(self, request: Request) -> Response:
        models = self.models.values()
        more = {"shortlisted": sum(m.shortlisted for m in models), "shortlists_widened": sum(m.widened for m in models)}
        return self._counted(request, PlainTextResponse(self.metrics.text(more), media_type="text/plain; version=0.0.4"))

    async def list_models(self, request: Request) -> Response:
        described = [
            {
                "name": name,
                "items": model.items_count,
                "bytes": model.manifest["sizes"]["bytes"] + (model.folder / "manifest.json").stat().st_size,
                "bits": model.manifest["sizes"]["bits"],
                "valid_ndcg@10": model.manifest.get("valid_ndcg@10"),
                "inputs": ["history", *model.inputs],
            }
            for name, model in self.models.items()
        ]
        return self._counted(request, JSONResponse(described))

    async def search(self, request: Request) -> Response:
        """Items whose title has the text `q` in it: beginnings of titles first, then in the catalogue's order."""
        asked = request.query_params.get("q", "").strip().casefold()[:200]
        places = [i for i, name in enumerate(self.folded) if asked in name] if asked else []
        places.sort(key=lambda i: not self.folded[i].startswith(asked))
        found = [{"id": self.names[i][0], "title": self.names[i][1]} for i in places[:SUGGESTIONS]]
        return self._counted(request, JSONResponse(found))

    async def recommend(self, request: Request) -> Response:
        asked = await self._body(request)
        began = time.perf_counter()
        result, model = self._answer(asked)
        users = result if isinstance(result, list) else [result]
        self.metrics.observe(time.perf_counter() - began)
        self.metrics.users += len(users)
        self.metrics.unknown += sum(user.unknown for user in users)
        self.metrics.by_popularity += sum(user.by_popularity for user in users)
        answers = [user.as_dict() for user in users]
        body = {"model": model} | ({"users": answers} if isinstance(result, list) else answers[0])
        return self._counted(request, JSONResponse(body))

    async def _body(self, request: Request) -> dict[str, Any]:
        limit, parts, size = self.limits.body_bytes, [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise refuse(413, f"the body is longer than {limit} bytes")
                    parts.append(part)
        except ClientDisconnect:
            raise refuse(499, "the client went away before the body was there") from None
        except TimeoutError:
            raise refuse(408, f"the body did not arrive within {self.limits.body_seconds:g} seconds") from None
        try:
            asked = json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            raise refuse(400, "the body is not valid JSON") from None
        if not isinstance(asked, dict):
            raise refuse(422, "the body must be a JSON object with the key history")
        for key in asked:
            if key not in KEYS:
                raise refuse(422, f"unknown key {key!r}; known: {', '.join(KEYS)}")
        if "history" not in asked:
            raise refuse(422, "the key history is missing")
        return asked

    def _answer(self, asked: dict[str, Any]) -> tuple[Any, str]:
        limits = self.limits
        name = asked.get("model", next(iter(self.models)))
        if not isinstance(name, str) or name not in self.models:
            raise refuse(422, f"unknown model {name!r}; known: {', '.join(self.models)}")
        history = asked["history"]
        if not isinstance(history, list):
            raise refuse(422, "history must be a list of item ids, or a list of such lists")
        many = bool(history) and isinstance(history[0], list)
        if many and len(history) > limits.users:
            raise refuse(422, f"at most {limits.users} histories in one request, not {len(history)}")
        for one in history if many else [history]:
            if isinstance(one, list) and len(one) > limits.history:
                raise refuse(422, f"a history has at most {limits.history} ids, not {len(one)}")
        for key in ("allow", "block"):
            value = asked.get(key)
            if value is not None and (not isinstance(value, list) or len(value) > limits.ids):
                raise refuse(422, f"{key} must be a list of at most {limits.ids} item ids")
        k, exclude = asked.get("k", 10), asked.get("exclude_seen", True)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= limits.k:
            raise refuse(422, f"k must be a whole number from 1 to {limits.k}")
        if not isinstance(exclude, bool):
            raise refuse(422, "exclude_seen must be true or false")
        try:
            events = {key: asked.get(key) for key in ("ratings", "times")}
            return self.models[name].recommend(history, k, exclude, asked.get("allow"), asked.get("block"), **events), name
        except (TypeError, ValueError) as error:
            raise refuse(422, str(error)) from None


def load(folders: Sequence[str], threads: int = 1) -> dict[str, Recommender]:
    """Models by the shortest end of their folders' paths that tells them apart: `lsq/0` for data/exported/lsq/0."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(paths) and not any(name.isdigit() for name in names):
            break
    return {name: Recommender.load(path, threads) for name, path in zip(names, paths, strict=True)}
