"""The HTTP service: answers, limits, metrics, and that nothing sent to it makes it fail. And its page, in a real browser."""

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from sasrec.deploy import Recommender, serve
from sasrec.deploy.service import Limits, Service, load
from tests.conftest import ROOT

Export = Callable[..., Path]
SMALL = Limits(body_bytes=5_000, body_seconds=0.5, users=3, history=20, ids=30, k=20)


@contextmanager
def serving(service: Service) -> Iterator[int]:
    """The port of the service, run in a thread."""
    # Only of a socket that says it is TCP does asyncio send small answers at once; others wait 40 ms for an acknowledgement.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(service.app(), log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def models(exported: Export) -> dict[str, Recommender]:
    return load([str(exported("lsq", 8, "first")), str(exported("ptq", 2, "second"))])


@pytest.fixture
def port(models: dict[str, Recommender]) -> Iterator[int]:
    with serving(Service(models, SMALL)) as port:
        yield port


def call(port: int, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, data)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if answer.headers["Content-Type"] == "application/json" else text.decode()


def test_models_are_named_by_their_folders(models: dict[str, Recommender]) -> None:
    assert list(models) == ["first", "second"]


def test_a_folder_named_twice_is_served_once(exported: Export) -> None:
    folder = exported()
    assert list(load([str(folder), f"{folder}/", str(folder / ".." / folder.name)])) == ["model"]


def test_the_service_recommends_what_the_model_does(port: int, models: dict[str, Recommender]) -> None:
    history = ["sku/3", "sku/1", "what"]
    for name, model in models.items():
        expected = model.recommend(history, 4, True, None, ["sku/5"])
        status, answer = call(port, "/recommend", {"history": history, "k": 4, "block": ["sku/5"], "model": name})
        assert (status, answer["model"], answer["unknown"]) == (200, name, 1)
        assert [item["id"] for item in answer["items"]] == [item.id for item in expected.items]
    status, answer = call(port, "/recommend", {"history": history, "allow": ["typo"], "block": ["sku/5", "x", 5]})
    assert (status, answer["items"], answer["nothing_allowed"]) == (200, [], True)
    assert (answer["unknown_allow"], answer["unknown_block"]) == (1, 2)
    status, answer = call(port, "/recommend", {"history": [history, []]})
    assert status == 200
    assert [user["by_popularity"] for user in answer["users"]] == [False, True]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b"[" * 4_000, 400, "not valid JSON"),
        (b'{"history": [' + b"9" * 4_900 + b"]}", 400, "not valid JSON"),
        ([], 422, "must be a JSON object"),
        ({}, 422, "history is missing"),
        ({"history": "sku/1"}, 422, "must be a list"),
        ({"history": [1.5]}, 422, "text or a whole number"),
        ({"history": [["sku/1"], 3]}, 422, "must come as a list"),
        ({"history": [["sku/1"]] * 4}, 422, "at most 3 histories"),
        ({"history": ["sku/1"] * 21}, 422, "at most 20 ids"),
        ({"history": [], "k": 0}, 422, "k must be"),
        ({"history": [], "k": 21}, 422, "from 1 to 20"),
        ({"history": [], "k": True}, 422, "k must be"),
        ({"history": [], "exclude_seen": 1}, 422, "exclude_seen must be"),
        ({"history": [], "allow": {}}, 422, "allow must be"),
        ({"history": [], "block": ["x"] * 31}, 422, "at most 30"),
        ({"history": [], "model": "third"}, 422, "unknown model 'third'; known: first, second"),
        ({"history": [], "kk": 3}, 422, "unknown key 'kk'"),
        (b"[" + b" " * 5_000, 413, "longer than 5000 bytes"),
    ],
)
def test_a_bad_body_gets_a_4xx_that_says_why(port: int, body: Any, status: int, message: str) -> None:
    found, answer = call(port, "/recommend", body)
    assert found == status
    assert message in answer["error"]


def test_other_paths_and_methods(port: int) -> None:
    assert call(port, "/nothing")[0] == 404
    assert call(port, "/recommend")[0] == 405
    assert call(port, "/health", method="DELETE")[0] == 405


def test_a_body_that_never_ends_is_given_up(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_client_that_goes_away_is_no_fault_of_the_service(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    for _ in range(100):
        text = call(port, "/metrics")[1]
        if 'path="/recommend"' in text:
            break
        time.sleep(0.05)
    assert 'sasrec_requests_total{path="/recommend",status="499"} 1\n' in text
    assert 'status="500"' not in text


def test_health_models_search_and_metrics(port: int, models: dict[str, Recommender]) -> None:
    assert call(port, "/health") == (200, {"status": "ok", "models": ["first", "second"]})
    listed = call(port, "/models")[1]
    assert [model["bits"] for model in listed] == [8, 2]
    # As in metrics: all but the names of items and the runtime.
    for model, own in zip(listed, models.values(), strict=True):
        left = [file for file in own.folder.iterdir() if file.is_file() and file.name != "items.csv"]
        assert model["bytes"] == sum(file.stat().st_size for file in left)
    assert call(port, "/search?q=TITLE%202")[1][:2] == [
        {"id": "sku/2", "title": "Title 2"},
        {"id": "sku/20", "title": "Title 20"},
    ]
    assert call(port, "/search?q=")[1] == call(port, "/search")[1] == []
    call(port, "/recommend", {"history": ["sku/1", "what"]})
    call(port, "/recommend", {"history": 3})
    text = call(port, "/metrics")[1]
    assert 'sasrec_requests_total{path="/recommend",status="200"} 1\n' in text
    assert 'sasrec_requests_total{path="/recommend",status="422"} 1\n' in text
    assert "sasrec_unknown_ids_total 1\n" in text
    assert 'sasrec_recommend_seconds_bucket{le="+Inf"} 1\n' in text


def mutated(rng: random.Random) -> bytes:
    """A request body that is more or less broken."""
    values: list[Any] = [
        None,
        True,
        0,
        -1,
        1.5,
        10**30,
        "",
        "sku/1",
        "\ud800",
        [],
        {},
        [[]],
        ["sku/2"],
        ["sku/3", 4],
        [["sku/1"], 2],
    ]
    keys = ["history", "ratings", "times", "k", "exclude_seen", "allow", "block", "model", "x"]
    body = {key: rng.choice(values) for key in rng.sample(keys, rng.randint(0, 5))}
    if rng.random() < 0.7:
        body["history"] = rng.choice([["sku/1", "sku/9"], ["a", 3], [], [["sku/1"], []]])
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([0, 0, 1, 3])):
        place = rng.randrange(len(data) + 1)
        data[place : place + rng.randint(0, 2)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 3)))
    return bytes(data)


def test_ten_thousand_broken_bodies_get_an_answer_each(port: int) -> None:
    rng = random.Random(0)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    seen: dict[int, int] = {}
    for _ in range(10_000):
        connection.request("POST", "/recommend", mutated(rng))
        answer = connection.getresponse()
        json.loads(answer.read())
        seen[answer.status] = seen.get(answer.status, 0) + 1
    assert set(seen) == {200, 400, 422}
    assert min(seen.values()) > 500
    assert call(port, "/health")[0] == 200


def test_the_command_serves_and_stops_when_told(exported: Export) -> None:
    command = [sys.executable, "-m", "sasrec", "serve", "--model", str(exported()), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = re.fullmatch(r"serving model at http://127\.0\.0\.1:(\d+)/\n", process.stdout.readline())
        assert said is not None
        assert call(int(said[1]), "/health")[0] == 200  # what is said is so: nothing is waited for
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert "Traceback" not in errors
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--port", "70000", "--port must be between 0 and 65535, not 70000"),
        ("--port", "-1", "--port must be between 0 and 65535, not -1"),
        ("--threads", "-3", "--threads must be at least 1, not -3"),
        ("--threads", "0", "--threads must be at least 1, not 0"),
        ("--host", "203.0.113.1", "cannot listen at 203.0.113.1:8000 (Cannot assign requested address); give another"),
        ("--host", "a..b", "cannot listen at a..b:8000 ("),
    ],
)
def test_options_that_cannot_be_served_are_refused_on_one_line(
    exported: Export, option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--model", str(exported()), option, value]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {message}") and shown.err.count("\n") == 1


def test_all_addresses_of_a_host_have_the_port_that_is_said(
    exported: Export, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two addresses of one host, and a port that the system chooses."""
    kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(*kind, (f"127.0.0.{i}", 0)) for i in (1, 2)])
    listeners = serve.listen("localhost", 0)
    first, second = (listener.getsockname() for listener in listeners)
    for listener in listeners:
        listener.close()
    assert (first[0], second[0]) == ("127.0.0.1", "127.0.0.2") and first[1] == second[1] > 0
    monkeypatch.setattr(uvicorn, "Server", lambda config: SimpleNamespace(run=lambda listeners: listeners[0].close()))
    monkeypatch.setattr(serve, "listen", lambda host, port: [socket.create_server(("127.0.0.1", 0))])
    assert serve.main(["--model", str(exported()), "--host", "::1"]) == 0
    assert "http://[::1]:" in capsys.readouterr().out


def test_a_port_that_is_taken_is_said_before_anything_is_served(exported: Export, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--model", str(exported()), "--port", str(port)]) == 1
    message = f"error: cannot listen at 127.0.0.1:{port} (Address already in use); give another --port or --host\n"
    assert capsys.readouterr() == ("", message)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# Types two titles, picks the first suggestion of each, and leaves what the page shows then.
DRIVE = """
<script>
(async () => {
  const until = async (test) => { for (let i = 0; i < 400 && !test(); i++) await new Promise((f) => setTimeout(f, 25)); };
  await until(() => document.body.dataset.ready);
  for (const text of ["title 3", "TITLE 14"]) {
    document.getElementById("title").value = text;
    document.getElementById("title").dispatchEvent(new Event("input"));
    await until(() => document.querySelector("#suggestions button"));
    const before = document.querySelectorAll("#history li").length;
    document.querySelector("#suggestions button").click();
    await until(() => document.querySelectorAll("#history li").length > before && !document.querySelector("#suggestions li"));
  }
  await new Promise((f) => setTimeout(f, 500));
  document.body.dataset.done = "yes";
})();
</script></body>
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_the_page_shows_two_models_side_by_side(models: dict[str, Recommender], tmp_path: Path) -> None:
    service = Service(models)
    service.page = service.page.replace("</body>", DRIVE)
    with serving(service) as port:
        done = subprocess.run(
            [
                str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                f"--user-data-dir={tmp_path}", "--timeout=20000", "--virtual-time-budget=20000", "--dump-dom",
                f"http://127.0.0.1:{port}/",
            ],
            capture_output=True, text=True, timeout=180, check=True, env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
    page = done.stdout
    assert 'data-done="yes"' in page
    assert re.findall(r'aria-label="remove ([^"]+)"', page) == ["Title 3", "Title 14"]
    shown = [re.findall(r'data-id="([^"]+)"', section) for section in re.findall(r"<section>.*?</section>", page, re.DOTALL)]
    expected = [[item.id for item in model.recommend(["sku/3", "sku/14"]).items] for model in models.values()]
    assert shown == expected
