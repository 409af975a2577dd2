"""Details of the service: its limits, counters, search, sockets and names."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from sasrec.deploy import Recommender, service
from sasrec.deploy import serve as command
from sasrec.deploy.recommender import Recommendation
from sasrec.deploy.service import Limits, Metrics, Service, load
from sasrec.errors import UserError


class Asked:
    """A model that notes what it is asked, and knows no item."""

    def __init__(self, ids: list[str] | None = None, titles: list[str] | None = None) -> None:
        self.ids, self.titles = ["", *(ids or [])], ["", *(titles or [])]
        self.asked: list[Any] = []
        self.shortlisted = self.widened = 0

    def recommend(self, history: Any, *options: Any, **known: Any) -> Any:
        self.asked.append((history, options, known))
        many = bool(history) and isinstance(history[0], list)
        return [Recommendation((), 2, True)] * len(history) if many else Recommendation((), 1, False)


def serve(*models: Asked, **limits: int) -> Service:
    made = Service({f"m{i}": own for i, own in enumerate(models)}, Limits(**limits))  # type: ignore[misc]
    made.app()
    return made


def request(path: str, body: bytes = b"", **query: str) -> Any:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    return SimpleNamespace(url=SimpleNamespace(path=path), query_params=query, stream=stream)


def test_what_is_at_a_limit_is_answered() -> None:
    many = serve(Asked(), users=2, history=3, ids=4, k=5)
    most = {"history": [["a"] * 3] * 2, "k": 5, "allow": ["b"] * 4, "block": ["b"] * 4}
    many._answer(most)
    for more in (
        {"history": [["a"]] * 3},
        {"k": 6},
        {"allow": ["b"] * 5},
        {"block": ["b"] * 5},
        {"history": [["a"], ["a"] * 4]},
    ):
        with pytest.raises(HTTPException, match="422"):
            many._answer({**most, **more})


def test_a_body_may_be_as_long_as_the_limit() -> None:
    body = b'{"history": []}'
    for room, fits in ((len(body), True), (len(body) - 1, False)):
        made = serve(Asked(), body_bytes=room)
        if fits:
            assert asyncio.run(made._body(request("/recommend", body))) == {"history": []}
        else:
            with pytest.raises(HTTPException, match="413"):
                asyncio.run(made._body(request("/recommend", body)))


def test_the_first_model_is_asked_with_the_defaults_unless_others_are_given() -> None:
    first, second = Asked(), Asked()
    made = serve(first, second)
    assert made._answer({"history": ["a"]})[1] == "m0"
    assert first.asked == [(["a"], (10, True, None, None), {"ratings": None, "times": None})] and not second.asked
    given = {"history": ["a"], "k": 3, "exclude_seen": False, "allow": ["b"], "block": ["c"], "ratings": [1], "times": [2]}
    assert made._answer({**given, "model": "m1"})[1] == "m1"
    assert second.asked == [(["a"], (3, False, ["b"], ["c"]), {"ratings": [1], "times": [2]})]


def test_counters_count_users_and_what_they_got() -> None:
    made = serve(Asked())
    for history in ([["a"], ["b"], ["c"]], ["a"]):
        asyncio.run(made.recommend(request("/recommend", json.dumps({"history": history}).encode())))
    lines = made.metrics.text().splitlines()
    assert {"sasrec_users_total 4", "sasrec_unknown_ids_total 7", "sasrec_answered_by_popularity_total 3"} <= set(lines)
    assert "sasrec_recommend_seconds_count 2" in lines  # of requests


def test_each_bucket_of_the_histogram_counts_all_up_to_its_end() -> None:
    metrics = Metrics()
    for seconds in (0.001, 0.02, 3.0):
        metrics.observe(seconds)
    found = [line.split('"')[1::2] + [line.split()[-1]] for line in metrics.text().splitlines() if "_bucket" in line]
    assert [count for _, count in found] == ["0", "1", "1", "1", "1", "2", "2", "2", "2", "3"]
    assert [end for end, _ in found] == [*map(str, service.BUCKETS), "+Inf"]


def test_a_search_gives_beginnings_first_and_at_most_twelve() -> None:
    titles = ["The Red Dog", "red", "", "Blue", "Redder"]
    made = serve(Asked(["1", "2", "reddish", "4", "5"], titles))
    found = json.loads(bytes(asyncio.run(made.search(request("/search", q=" RED "))).body))
    assert [(one["id"], one["title"]) for one in found] == [
        ("2", "red"), ("reddish", "reddish"), ("5", "Redder"), ("1", "The Red Dog"),
    ]  # fmt: skip
    many = serve(Asked([str(i) for i in range(20)], ["same"] * 20))
    found = json.loads(bytes(asyncio.run(many.search(request("/search", q="same"))).body))
    assert [one["id"] for one in found] == [str(i) for i in range(12)]


def test_unknown_paths_are_counted_as_one_and_the_page_has_its_policy() -> None:
    made = serve(Asked())
    for path in ("/a", "/b"):
        asyncio.run(made.refused(request(path), HTTPException(404, "no")))
    page = asyncio.run(made.index(request("/")))
    assert made.metrics.requests == {("other", 404): 2, ("/", 200): 1}
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_what_fails_is_counted_as_an_error_that_tells_nothing() -> None:
    made = serve(Asked())
    answer = asyncio.run(made.failed(request("/recommend"), ValueError("secret")))
    assert (answer.status_code, bytes(answer.body)) == (500, b'{"error":"internal error"}')
    assert made.metrics.requests == {("/recommend", 500): 1}


def test_shortlists_of_all_models_are_counted_together() -> None:
    first, second = Asked(), Asked()
    first.shortlisted, first.widened, second.shortlisted, second.widened = 5, 2, 7, 1
    lines = bytes(asyncio.run(serve(first, second).show_metrics(request("/metrics"))).body).decode().splitlines()
    assert {"sasrec_shortlisted_total 12", "sasrec_shortlists_widened_total 3"} <= set(lines)


def test_listeners_are_closed_where_one_of_them_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    class Noted(socket.socket):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    addresses = [(*kind, ("127.0.0.1", 0)), (*kind, ("203.0.113.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    monkeypatch.setattr(socket, "socket", Noted)
    with pytest.raises(UserError, match="cannot listen"):
        command.listen("somewhere", 0)
    assert [one.fileno() for one in made] == [-1, -1]


def test_the_command_serves_with_as_many_threads_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loads(*given: Any) -> Any:
        raise UserError(f"loads {given}")

    monkeypatch.setattr(command, "load", loads)
    assert command.main(["--model", "a", "--model", "b", "--threads", "3"]) == 1
    assert capsys.readouterr().err == "error: loads (['a', 'b'], 3)\n"


def test_models_are_named_by_as_much_of_their_paths_as_tells_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number alone, which is a seed, tells nothing."""
    monkeypatch.setattr(Recommender, "load", lambda path, threads: (str(path), threads))
    assert list(load(["/x/lsq/0"])) == ["lsq/0"]
    assert list(load(["/x/lsq/0", "/x/lsq/1"])) == ["lsq/0", "lsq/1"]
    named: dict[str, Any] = dict(load(["/x/one", "/x/two"], 3))
    assert named == {"one": ("/x/one", 3), "two": ("/x/two", 3)}
    assert list(load(["/x/a/m", "/x/b/m", "/x/a/m"])) == ["a/m", "b/m"]
