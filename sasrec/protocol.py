"""What a number means: the protocol card beside every table, and the flat metrics of one variant."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sasrec import metrics
from sasrec.config import EvaluateParams
from sasrec.evaluation import Ranks
from sasrec.files import atomic, write_json
from sasrec.metrics import Floats

DIGITS = 5

# What ranks are taken among, and how the keys of its metrics begin.
PREFIX = {"full": "", "sampled": "sampled_", "popsampled": "popsampled_"}
PROTOCOLS = tuple(PREFIX)


def card(stats: dict[str, Any], params: EvaluateParams) -> dict[str, Any]:
    """Everything two numbers must share to be compared. stats: `data/prepared/stats.json`."""
    sampled = f"ranked against {stats['candidates']} uniform items the user never interacted with"
    if few := stats["few_candidates"]:
        sampled += f" (all unseen items for the {few} users who have fewer)"
    popsampled = (
        f"ranked against {stats['candidates']} items the user never interacted with, drawn by how often they occur in training"
    )
    if few := stats["few_popular_candidates"]:
        popsampled += f" (all of those for the {few} users who have fewer)"
    return {
        "data": f"{stats['dataset']}, sha256 {stats['sha256'][:16]}",
        "filter": ", ".join(f"{key}: {value}" for key, value in stats["filter"].items() if value is not None),
        "split": _split(stats["split"], stats["time_unit"]),
        "users": stats["evaluated"],
        "items": stats["items"],
        "full": "ranked against every item" + (" not seen before" if params.exclude_seen else ""),
        "sampled": sampled,
        "popsampled": popsampled,
        "candidates_seed": stats["candidates_seed"],
        "ties": "rank = 1 + higher + equal / 2",
    }


def _split(facts: dict[str, Any], unit: str | None) -> str:
    if facts["split"] == "leave_one_out":
        return "leave-one-out: the last item of a user is for test, the last but one for validation"
    validation, test = (
        f"{part} from {_moment(facts[f'{part}_cut'], unit)} on ({100 * facts[f'{part}_share']:g} % of all interactions)"
        for part in ("validation", "test")
    )
    return (
        f"temporal: training before, {validation}, {test}; the target is the {facts['target']} item of a user in the period, "
        "its history everything of the user before it"
    )


def _moment(time: int, unit: str | None) -> str:
    """As an ISO date and time (UTC); as it is where the number is too small to be a real time since 1970."""
    moment = np.array(time, f"datetime64[{unit}]")
    return str(moment if moment >= np.datetime64("1980") else time)


def short_hash(value: dict[str, Any]) -> str:
    """Eight hexadecimal digits; equal for two tables exactly when their cards are."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def quality(ranks: Mapping[str, Floats], params: EvaluateParams) -> dict[str, Any]:
    """What the ranks alone give: every metric's mean, the interval of NDCG@10, and the standard deviations over seeds,
    None of a single seed. ranks: (seeds, users) by protocol, full and sampled at least. Rounded to DIGITS."""
    values: dict[str, float | None] = {}
    for name in (name for name in PROTOCOLS if name in ranks):
        values |= metrics.summarize(ranks[name], PREFIX[name])
    gains = metrics.ndcg(ranks["full"], 10)
    values["ndcg@10_low"], values["ndcg@10_high"] = metrics.bootstrap_interval(gains, params.bootstrap, params.seed)
    values["hr@10_std"] = metrics.deviation(metrics.hit_rate(ranks["full"], 10).mean(1))
    values["ndcg@10_std"] = metrics.deviation(gains.mean(1))
    values["sampled_ndcg@10_std"] = metrics.deviation(metrics.ndcg(ranks["sampled"], 10).mean(1))
    counts = dict(zip(("seeds", "users"), ranks["full"].shape, strict=True))
    return {key: value if value is None else round(value, DIGITS) for key, value in values.items()} | counts


def flat_metrics(
    ranks: Sequence[Ranks],
    params: EvaluateParams,
    protocol: dict[str, Any],
    sizes: Sequence[Mapping[str, float]],
    validation: float | None,
) -> dict[str, Any]:
    """The content of `metrics/<variant>.json`. Of each seed: ranks; sizes: bits, bytes, embedding_bytes, weight_bytes, of which
    the mean is taken. validation: NDCG@10 of the checkpoint on validation, the mean over seeds."""
    stacked = {name: np.stack([getattr(r, name) for r in ranks]).astype(np.float64) for name in PROTOCOLS}
    result = quality(stacked, params)
    result["coverage@10"] = round(float(np.mean([r.coverage for r in ranks])), DIGITS)
    result["valid_ndcg@10"] = validation if validation is None else round(validation, DIGITS)
    for key in sizes[0]:
        mean = float(np.mean([own[key] for own in sizes]))
        result[key] = round(mean) if key.endswith("bytes") or mean.is_integer() else round(mean, 2)
    return result | {"card": short_hash(protocol)}


def write_ranks(folder: Path, ranks: Sequence[Ranks], seeds: Sequence[int], protocol: dict[str, Any]) -> None:
    """Per-user ranks, (users,) float32 in the order of the evaluated users, a folder a seed; and the card."""
    for seed, result in zip(seeds, ranks, strict=True):
        for name in PROTOCOLS:
            content = io.BytesIO()
            np.save(content, getattr(result, name))
            with atomic(folder / str(seed) / f"{name}.npy") as temporary:
                temporary.write_bytes(content.getvalue())
    write_json(folder / "card.json", protocol)
