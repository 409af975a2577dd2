"""Load on the HTTP service: python -m tests.load [--model FOLDER] [--requests N] [--clients N]

Starts `python -m sasrec serve` and keeps it busy over the loopback, each client with a connection of its own and its next
request as soon as the last is answered. Without --model: random weights in the shape of MovieLens-1M (3,416 items, hidden 64,
length 50, 8 bits). Prints requests per second, latencies, errors, and the memory and processor time of the server.
"""

import argparse
import contextlib
import json
import os
import random
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ITEMS = 3_416


def model(folder: Path) -> None:
    """Export a random one. In a process of its own: torch would stay in memory."""
    import torch

    from sasrec.config import ModelParams, QuantParams
    from sasrec.deploy.artefact import Item, export
    from sasrec.models.sasrec import SASRec
    from sasrec.quant.attach import attach, calibrate, freeze, load_method

    def made() -> SASRec:
        torch.manual_seed(0)
        return SASRec(ModelParams(hidden=64), ITEMS).eval()

    quantized = made()
    module, options = load_method("ptq", {})
    attach(quantized, QuantParams(), module, options)
    calibrate(quantized, [torch.randint(1, ITEMS + 1, (16, 50))])
    items = [Item(str(i), f"Title {i}") for i in range(1, ITEMS + 1)]
    export(folder, made(), freeze(quantized), items, {})


@dataclass
class Client:
    """One connection, with at most one request under way."""

    connection: socket.socket
    began: float = 0.0
    received: bytes = b""
    times: list[float] = field(default_factory=list)

    def send(self, request: bytes) -> None:
        self.began = time.perf_counter()
        self.connection.sendall(request)

    def answered(self) -> int | None:
        """Read what is there; the status once the answer is whole. 0: the connection was closed."""
        part = self.connection.recv(65536)
        if not part:
            return 0
        self.received += part
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return None
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) < length:
            return None
        self.times.append(time.perf_counter() - self.began)
        self.received = b""
        return int(head[9:12]) if len(json.loads(body).get("items", ())) == 10 else -1


def requests(ids: list[str], count: int, seed: int = 0) -> list[bytes]:
    """Bodies with histories of 1 to 50 items."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        body = json.dumps({"history": rng.choices(ids, k=rng.randint(1, 50)), "k": 10}).encode()
        made.append(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    return made


def load(port: int, count: int, clients: int, bodies: list[bytes]) -> tuple[list[float], Counter[int], float]:
    """Latencies in seconds, answers by status (0: connection lost, -1: not ten items), and the seconds it all took."""
    statuses: Counter[int] = Counter()
    sent = 0
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        everyone = []
        for _ in range(clients):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            everyone.append(Client(connection))
            selector.register(connection, selectors.EVENT_READ, everyone[-1])
        began = time.perf_counter()
        for client in everyone:
            client.send(bodies[sent % len(bodies)])
            sent += 1
        while sum(statuses.values()) < count:
            ready = selector.select(timeout=30)
            if not ready:
                raise SystemExit("error: the server has not answered for 30 seconds")
            for key, _ in ready:
                client = key.data
                status = client.answered()
                if status is None:
                    continue
                statuses[status] += 1
                if status == 0:
                    raise SystemExit("error: the server closed a connection")
                if sent < count:
                    client.send(bodies[sent % len(bodies)])
                    sent += 1
        seconds = time.perf_counter() - began
    return [one for client in everyone for one in client.times], statuses, seconds


def status_of(pid: int) -> tuple[float, float]:
    """Resident megabytes and seconds of processor time of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(lines["VmRSS"].split()[0]) / 1024, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of an exported model")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        model(Path(options.make))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.model or temporary)
        if not options.model:
            subprocess.run([sys.executable, "-m", "tests.load", "--make", temporary], check=True)
        ids = [line.split(",")[1] for line in (folder / "items.csv").read_text(encoding="utf-8").splitlines()[1:]]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "sasrec", "serve", "--model", str(folder), "--port", str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                for _ in range(600):
                    with contextlib.suppress(ConnectionRefusedError):
                        socket.create_connection(("127.0.0.1", port)).close()
                        break
                    time.sleep(0.1)
                bodies = requests(ids, 5_000)
                load(port, min(1_000, options.requests), options.clients, bodies)  # what is done once is done
                _, before = status_of(server.pid)
                times, statuses, seconds = load(port, options.requests, options.clients, bodies)
                memory, after = status_of(server.pid)
            finally:
                server.terminate()
    times.sort()
    p50, p99 = (times[min(len(times) - 1, int(share * len(times)))] * 1000 for share in (0.5, 0.99))
    errors = sum(count for status, count in statuses.items() if status != 200)
    rate = options.requests / seconds
    print(f"{options.requests:,} requests of {options.clients} clients: {rate:,.0f} a second, {errors} errors")
    print(f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {times[-1] * 1000:.1f} ms")
    print(f"server: {memory:.0f} MB resident, {(after - before) / options.requests * 1e6:.0f} us of processor time a request")
    sys.exit(errors > 0)


if __name__ == "__main__":
    main()
