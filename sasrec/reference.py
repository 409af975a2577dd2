"""Committed reference results: every user's rank beside the tables, so that anyone can check them without training.

metrics/reference/NAME.json: `command`, `params`, `environment`, `data`, `card`, `tried`, `published`, `variants` (flat
metrics by name) and `comparisons`. Beside it in metrics/reference/NAME/: the curves, `dvc.lock`, and
`ranks/VARIANT-SEED.PROTOCOL.npy.gz`: twice each user's rank, because mean-tie ranks may be halves; uint16, or uint32 where
that is too small.
"""

import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sasrec import metrics
from sasrec.config import BASELINES, EvaluateParams
from sasrec.errors import UserError
from sasrec.files import read_json
from sasrec.metrics import Floats
from sasrec.protocol import DIGITS, PROTOCOLS, quality, short_hash
from sasrec.report.results import (
    BASELINE_SEED,
    FLOATS,
    Comparison,
    Kind,
    Variant,
    compare,
    from_control,
    pairs,
    reference,
)

ROOT = Path("metrics/reference")


def packed(ranks: Floats) -> bytes:
    """Ranks, whole or half numbers, as gzipped npy; the same ranks always give the same bytes. Raises ValueError."""
    doubled = np.asarray(ranks, np.float64) * 2
    if not np.array_equal(doubled, np.rint(doubled)) or (len(doubled) and doubled.min() < 2):
        raise ValueError("ranks are whole or half numbers from 1")
    kind = np.uint16 if not len(doubled) or doubled.max() <= np.iinfo(np.uint16).max else np.uint32
    content = io.BytesIO()
    np.save(content, doubled.astype(kind))
    return gzip.compress(content.getvalue(), mtime=0)


def unpacked(path: Path) -> Floats:
    """The ranks in a file of `packed`. Raises UserError."""
    try:
        return np.load(io.BytesIO(gzip.decompress(path.read_bytes())), allow_pickle=False) / 2
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it is part of the reference and has to be committed with it") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def rank_file(folder: Path, variant: str, seed: int, protocol: str) -> Path:
    """folder: the one of a reference."""
    return folder / "ranks" / f"{variant}-{seed}.{protocol}.npy.gz"


def kind_of(variant: str, params: Mapping[str, Any]) -> Kind:
    """params: all of params.yaml as a mapping."""
    if variant in BASELINES:
        return "baseline"
    if variant in FLOATS:
        return "model"
    return "model" if variant in params["models"] else "control" if variant == "control" else "method"


def load_variants(folder: Path, content: Mapping[str, Any]) -> Iterator[tuple[Variant, dict[str, Floats]]]:
    """The variants of a reference with what their ranks in `folder` say, and the ranks themselves: (seeds, users) by
    protocol."""
    params = content["params"]
    source = params["quant"]["model"]
    for variant, values in content["variants"].items():
        kind = kind_of(variant, params)
        seeds = (BASELINE_SEED,) if kind == "baseline" else tuple(params["seeds"])
        ranks = {
            protocol: np.stack([unpacked(rank_file(folder, variant, seed, protocol)) for seed in seeds])
            for protocol in PROTOCOLS
        }
        gains, log2_ranks = metrics.ndcg(ranks["full"], 10), np.log2(ranks["full"])
        later = from_control(params["quant"], params.get("methods", {}).get(variant))
        wanted = reference(variant, kind, tuple(content["variants"]), source, later)
        yield Variant(variant, kind, values, gains, log2_ranks, content["card"], wanted), ranks


def comparison_rows(found: Mapping[tuple[str, str], Comparison]) -> list[dict[str, Any]]:
    """The paired comparisons as they stand in a reference file."""
    return [
        {
            "variant": variant,
            **{key: round(value, DIGITS) if isinstance(value, float) else value for key, value in asdict(comparison).items()},
            "verdict": comparison.verdict,
        }
        for (variant, _), comparison in found.items()
    ]


def recomputed(folder: Path, content: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """From the ranks in `folder` alone: what they say of each variant, and every comparison."""
    evaluate = content["params"]["evaluate"]
    params = EvaluateParams(bootstrap=evaluate["bootstrap"], seed=evaluate["seed"])
    loaded = list(load_variants(folder, content))
    values = {variant.name: quality(ranks, params) for variant, ranks in loaded}
    return values, comparison_rows(compare(pairs([variant for variant, _ in loaded]), params))


def problems(name: str) -> list[str]:
    """Where a reference file says something else than its ranks do; empty where all agrees. Raises UserError."""
    path = ROOT / f"{named(name)}.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; references: {', '.join(names()) or 'none'}")
    content = read_json(path)
    return differences(path, content, *recomputed(ROOT / name, content))


def differences(
    path: Path, content: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Where `content`, the reference file at `path`, says something else than the values of its variants and the rows of its
    comparisons that its ranks give."""
    found = []
    for variant, computed in values.items():
        written = content["variants"][variant]
        found += [
            f"{path}: {variant}: {key} is {written.get(key)}, the ranks give {value}"
            for key, value in computed.items()
            if not same(written.get(key), value)
        ]
        if written["card"] != short_hash(content["card"]):
            found.append(f"{path}: {variant}: the hash {written['card']} is not that of the card")
    if len(rows) != len(content["comparisons"]):
        found.append(f"{path}: {len(content['comparisons'])} comparisons, the variants make {len(rows)}")
    for row, written in zip(rows, content["comparisons"], strict=False):
        found += [
            f"{path}: {row['variant']} against {row['reference']}: {key} is {written.get(key)}, the ranks give {value}"
            for key, value in row.items()
            if not same(written.get(key), value)
        ]
    return found


def same(written: Any, computed: Any) -> bool:
    """Equal, numbers to the last digit that is written: another CPU may sum in another order."""
    if isinstance(written, float) and isinstance(computed, float):
        return math.isclose(written, computed, rel_tol=0, abs_tol=1.5 * 10**-DIGITS)
    return bool(written == computed)


def named(name: str) -> str:
    """`name`, which a reference may have: a folder of that name replaces what stands there. Raises UserError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(
            f"'{name}' is no name for a reference; write letters, digits, '-', '_' and '.', a letter or digit first"
        )
    return name


def names() -> list[str]:
    """The committed references."""
    return sorted(path.stem for path in ROOT.glob("*.json"))
