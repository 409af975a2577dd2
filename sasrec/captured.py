"""Training steps as CUDA graphs: what Python says to a GPU once for each shape of a batch, and not again.

A step is 355 kernels, and saying which takes nine times as long as working them out (18 ms and 2 of a step at length 200,
hidden 50, on an H200). A graph of them is started by one call. It has the shapes and addresses that it was captured with, so
batches are filled up to a few shapes with positions that do not count (`losses.mean`), and are copied to where the graph of
their shape reads them. Draws are those of steps that are not captured: of batches and negatives on the host, as for the CPU, of
dropout by torch's generator, whose state a graph reads anew each time. So an epoch gives the same bits with graphs and without.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec.data.batches import Batch, Ints

# Rows and positions of a batch are filled up to multiples of this.
GRAIN = 16
# What stands at positions that do not count, where an item is asked for: any will do, but for padding, which has no logit.
ANY_ITEM = 1


@dataclass(frozen=True)
class Filled:
    """A batch filled up: (rows, length) item ids, 0 = padding; targets (rows, length), 0 at what does not count; negatives
    (rows * length, n), (rows, n) or (n,), as `losses.compute` takes them; windows as `Batch`."""

    histories: Ints
    targets: Ints
    negatives: Ints
    windows: Ints | None


def rounded_up(n: int) -> int:
    return -(-n // GRAIN) * GRAIN


def filled(batch: Batch, negatives: Ints, per: str, max_len: int) -> Filled:
    """`batch` with rows at its end and padding at the left of each row. negatives: of its real positions, (tokens, n), where
    per is 'each' or 'none'; (rows, n) where it is 'sequence'; (n,) where it is 'batch'."""
    rows, length = batch.targets.shape
    height, width = rounded_up(rows), min(rounded_up(length), max_len)

    def grown(array: Ints) -> Ints:
        return np.pad(array, ((0, height - rows), (width - length, 0)))

    targets = grown(batch.targets)
    if per == "sequence":
        own = np.pad(negatives, ((0, height - rows), (0, 0)), constant_values=ANY_ITEM)
    elif per == "batch":
        own = negatives
    else:
        own = np.full((targets.size, negatives.shape[1]), ANY_ITEM, np.int64)
        own[targets.ravel() > 0] = negatives
    return Filled(grown(batch.histories), targets, own, None if batch.windows is None else grown(batch.windows))


@dataclass(frozen=True)
class Static:
    """A filled batch on the GPU, always at the same addresses: parts of `all` of the shapes of a `Filled`."""

    all: Tensor
    histories: Tensor
    targets: Tensor
    negatives: Tensor
    windows: Tensor | None
    log_expected: Tensor | None


Work = Callable[[Static], None]


@contextmanager
def nothing_freed() -> Iterator[None]:
    """No garbage is collected inside: the graphs of an earlier training may be among it, and giving one back breaks off a
    capture that is under way."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CapturedSteps:
    """Runs `work`, a whole training step on the tensors of a Static, as a graph for each shape. The first of all steps is not
    captured: libraries and the optimizer set themselves up in it."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.stream = torch.cuda.Stream(device)
        self.ready = False
        self.state: Any = None
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Static]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def keep_while(self, state: Any) -> None:
        """Forget all graphs where `state`, which stands for what a step does besides its batch, is not what it was."""
        if state != self.state:
            self.state, self.graphs, self.pool = state, {}, torch.cuda.graph_pool_handle()

    def forget(self) -> None:
        """Give the graphs and their memory back."""
        self.keep_while(None)

    @contextmanager
    def running(self) -> Iterator[None]:
        """What runs inside is on the stream that graphs are captured on, after all that came before; what comes after waits."""
        around = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(around)
        with torch.cuda.stream(self.stream):
            yield
        around.wait_stream(self.stream)

    def __call__(self, batch: Filled, log_expected: NDArray[np.float32] | None) -> None:
        """One step, within `running`."""
        parts = [batch.histories, batch.targets, batch.negatives, *([] if batch.windows is None else [batch.windows])]
        shapes = tuple(part.shape for part in parts)
        graph, static = self.graphs.get(shapes) or (None, self._static(parts, log_expected))
        static.all.copy_(torch.from_numpy(np.concatenate([part.ravel() for part in parts])).pin_memory(), non_blocking=True)
        if static.log_expected is not None and log_expected is not None:
            static.log_expected.copy_(torch.from_numpy(log_expected).pin_memory(), non_blocking=True)
        if not self.ready:
            self.work(static)
            self.ready = True
            return
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with nothing_freed(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.work(static)
            self.graphs[shapes] = graph, static
        graph.replay()

    def _static(self, parts: list[Ints], log_expected: NDArray[np.float32] | None) -> Static:
        whole = torch.empty(sum(part.size for part in parts), dtype=torch.int64, device=self.device)
        own = [part.view(like.shape) for part, like in zip(whole.split([part.size for part in parts]), parts, strict=True)]
        windows = own[3] if len(own) > 3 else None
        expected = None if log_expected is None else torch.empty(len(log_expected), device=self.device)
        return Static(whole, own[0], own[1], own[2], windows, expected)
