"""Damaged folders and wild requests: each ends in a clear error or in an answer, never in anything else."""

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sasrec.deploy import ArtefactError, Recommender
from sasrec.deploy.recommender.manifest import digest, read_manifest
from tests.deploy.conftest import files_of

Export = Callable[..., Path]
VALUES: list[Any] = [None, True, 0, -1, 3, 2**40, 1.5, "", "x", "../x", [], {}, [1], {"a": 1}]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Cut, edited, lengthened, or with a part moved."""
    at = rng.randrange(len(content))
    kind = rng.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + rng.randbytes(rng.randint(1, 9)) + content[at:]
    if kind == 3:
        return content[at:] + content[:at]
    return rng.randbytes(len(content))


def test_a_thousand_damaged_files_are_refused_by_name(exported: Export) -> None:
    folder = exported("lsq", 4)
    rng = random.Random(0)
    files = files_of(folder)
    for _ in range(1_000):
        file = rng.choice(files)
        content = file.read_bytes()
        changed = damaged(rng, content)
        file.write_bytes(changed)
        if changed != content:
            with pytest.raises(ArtefactError, match=file.name):
                Recommender.load(folder)
        file.write_bytes(content)
    Recommender.load(folder)


def edited(rng: random.Random, manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with one value somewhere in it removed or replaced, and a digest that says so."""
    changed = copy.deepcopy(manifest)
    place: Any = changed
    while True:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
        break
    changed["digest"] = digest(changed)
    return changed


def test_three_hundred_edited_manifests_are_refused_or_harmless(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even of someone who makes the digest right: what is said of sizes, hashes, places and widths is checked or fails
    clearly; what no computation reads (data, training) may say anything."""
    monkeypatch.setattr("sasrec.deploy.artefact.FROM_ENTRIES", 1)
    folder = exported("lsq", 4)
    path = folder / "manifest.json"
    manifest = read_manifest(folder)
    rng = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(300):
        path.write_text(json.dumps(edited(rng, manifest)))
        try:
            model = Recommender.load(folder)
            model.recommend(["sku/3", "sku/1"], k=5)
            seen["loaded"] += 1
        except ArtefactError as error:
            assert "manifest.json" in str(error) or any(name in str(error) for name in manifest["files"]), error
            seen["refused"] += 1
    assert min(seen["loaded"], seen["refused"]) > 50


def wild(rng: random.Random) -> Any:
    """Something that is an id, or is not."""
    kind = rng.randrange(8)
    if kind == 0:
        return f"sku/{rng.randint(-5, 40)}"
    if kind == 1:
        return "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x300, 0xD7FF)])) for _ in range(rng.randrange(6)))
    if kind == 2:
        return rng.randint(-(10**20), 10**20)
    return rng.choice(VALUES) if rng.random() < 0.2 else f"sku/{rng.randint(1, 30)}"


def test_three_thousand_wild_histories_get_an_answer_or_a_type_error(exported: Export) -> None:
    model = Recommender.load(exported())
    known = set(model.ids[1:])
    rng = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(3_000):
        history = [wild(rng) for _ in range(rng.randrange(12))]
        options: dict[str, Any] = {key: [wild(rng)] * rng.randrange(3) for key in ("allow", "block") if rng.random() < 0.2}
        try:
            result = model.recommend(history, rng.randint(1, 40), rng.random() < 0.5, **options)
        except TypeError:
            seen["refused"] += 1
            continue
        seen["answered"] += 1
        many = result if isinstance(result, list) else [result]
        assert all(item.id in known for one in many for item in one.items)
    assert min(seen.values()) > 300


def test_files_of_another_model_are_refused(exported: Export) -> None:
    first, second = exported("lsq", 4, "first"), exported("ptq", 2, "second")
    for name in ("item_table.bin", "encoder.onnx", "top_k.onnx", "weights.bin", "manifest.json"):
        content = (first / name).read_bytes()
        shutil.copy(second / name, first / name)
        with pytest.raises(ArtefactError):
            Recommender.load(first)
        (first / name).write_bytes(content)
