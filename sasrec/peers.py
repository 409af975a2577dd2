"""The same network run by others, to compare an exported model with: torch, and onnxruntime in full precision and with its
own ways to 8 bits. All from histories of internal ids to the ten best of all items.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from sasrec.deploy.artefact import Item, export
from sasrec.deploy.recommender.manifest import read_manifest
from sasrec.deploy.recommender.model import CHUNK, Recommender
from sasrec.deploy.recommender.tensors import Tensors
from sasrec.models.registry import Model

K = 10
# What static quantization takes its ranges from: so many random histories, one at a time.
CALIBRATION = 16

Ids = NDArray[np.int64]
# What is timed: histories (batch, length) to anything.
Work = Callable[[Ids], Any]


def chunks(histories: Ids) -> Iterator[Ids]:
    """Parts of the size that onnxruntime is fastest at."""
    for at in range(0, len(histories), CHUNK):
        yield histories[at : at + CHUNK]


def by_torch(model: Model, compiled: bool = False) -> Work:
    """In one call for the whole batch; compiled: by torch.compile, for the shapes of the first call alone."""
    table = model.scoring_table.all().detach()

    def work(batch: torch.Tensor) -> Any:
        return (model.encode(batch, last=True)[:, 0] @ table.T).topk(min(K, len(table)))

    run = torch.compile(work, dynamic=False) if compiled else work

    def timed(histories: Ids) -> Any:
        with torch.no_grad():
            return run(torch.from_numpy(histories))

    return timed


def by_runtime(model: Recommender) -> Work:
    """By the runtime of an exported folder."""
    nothing = np.zeros(0, np.int64)
    return lambda histories: [model.top_k(model.encode(part), K, [nothing] * len(part)) for part in chunks(histories)]


def whole(folder: Path, file: str) -> onnx.ModelProto:
    """A graph of an exported folder with the initializers inside that the runtime gives it."""
    manifest = read_manifest(folder)
    model = onnx.load(folder / file, load_external_data=False)
    tensors = Tensors(folder, manifest)
    for initializer in model.graph.initializer:
        if initializer.name in manifest["given"][file]:
            array = tensors.initializer(initializer.name, manifest["scoring_table"])
            initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
    return model


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """A list of inputs, once."""

    def __init__(self, inputs: list[dict[str, Any]]) -> None:
        self.inputs = iter(inputs)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.inputs, None)


def session(path: Path, threads: int) -> InferenceSession:
    options = SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return InferenceSession(path, options, providers=["CPUExecutionProvider"])


def given(encoder: InferenceSession, histories: Ids) -> dict[str, NDArray[Any]]:
    """The inputs of an encoder: item ids, and for whatever else it takes of each event the same number everywhere: times do not
    depend on it, and ranges of what is not known, NaN, could not be calibrated."""
    others = {other.name: other.type for other in encoder.get_inputs() if other.name != "items"}
    types = {name: np.float64 if kind == "tensor(double)" else np.float32 for name, kind in others.items()}
    return {"items": histories} | {name: np.ones(histories.shape, dtype) for name, dtype in types.items()}


def by_sessions(encoder: InferenceSession, top_k: InferenceSession, count: NDArray[np.int64]) -> Work:
    """count: (1,) how many items of each history."""

    def timed(histories: Ids) -> Any:
        found = []
        for part in chunks(histories):
            state = encoder.run(None, given(encoder, part))[0]
            pairs = np.stack([np.arange(len(part)), np.zeros(len(part), np.int64)], 1)
            found.append(top_k.run(None, {"state": state, "hidden": pairs, "k": count}))
        return found

    return timed


def by_onnxruntime(plain: Model, threads: int, int8: bool = True) -> dict[str, Work]:
    """Of the network in full precision, exported: `onnxruntime_fp32`, and with int8 also `onnxruntime_dynamic` and
    `onnxruntime_static`: what quantize_dynamic and quantize_static of onnxruntime make of the encoder and of the scoring."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "fp32")
        export(folder, plain, {}, [Item("")] * plain.items, {})
        model = Recommender.load(folder, threads)
        works = {"onnxruntime_fp32": by_runtime(model)}
        if not int8:
            return works
        rng = np.random.default_rng(1)
        histories = rng.integers(1, plain.items + 1, (CALIBRATION, 1, model.max_len))
        encoder = model._encoder
        never, count = np.zeros((1, 2), np.int64), np.array([min(K, plain.items)], np.int64)
        inputs = {
            "encoder.onnx": [given(encoder, one) for one in histories],
            "top_k.onnx": [{"state": model.encode(one), "hidden": never, "k": count} for one in histories],
        }
        made: dict[str, list[InferenceSession]] = {"onnxruntime_dynamic": [], "onnxruntime_static": []}
        for file, calibration in inputs.items():
            source, target = Path(temporary, file), Path(temporary, "int8.onnx")
            onnx.save(whole(folder, file), source)
            with quiet():
                quantize_dynamic(source, target)
            made["onnxruntime_dynamic"].append(session(target, threads))
            with quiet():
                quantize_static(
                    source, target, Reader(calibration),
                    quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    per_channel=True,
                )  # fmt: skip
            made["onnxruntime_static"].append(session(target, threads))
        return works | {name: by_sessions(of_network, of_table, count) for name, (of_network, of_table) in made.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what onnxruntime's quantization logs and prints by the way, and numpy's warnings of its constant tensors."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
