"""What the manifest says, and folders that it does not describe, which are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sasrec.deploy import ArtefactError, Recommender
from sasrec.deploy.recommender.manifest import digest, read_manifest
from sasrec.files import read_json, write_json
from tests.deploy.conftest import files_of

Export = Callable[..., Path]


def test_the_manifest_says_what_is_in_the_folder(exported: Export) -> None:
    manifest = read_manifest(exported("lsq", 4))
    assert manifest["valid_ndcg@10"] == 0.5
    entry = manifest["tensors"]["item_table.weight"]
    assert (entry["bits"], entry["levels"], entry["compute"], entry["accumulator"]) == (4, 16, "int8", "int32")
    assert entry["scales"] == {"dtype": "float16", "count": 31}
    # Two blocks: a norm before each half and one at the end; a softmax each, whose weights are made to shares and summed.
    expected = {"LayerNormalization": 5, "Softmax": 2, "ReduceMax": 2, "ReduceSum": 2, "Max": 2, "Relu": 2}
    assert manifest["float_operators"].items() >= expected.items()
    assert "MatMul" not in manifest["float_operators"]


def test_truncated_edited_missing_and_foreign_files_are_refused(exported: Export, tmp_path: Path) -> None:
    good = exported("lsq", 4)
    for name in (str(file.relative_to(good)) for file in files_of(good)):
        content = (good / name).read_bytes()
        half = len(content) // 2
        for bad in (content[:half], content[:-2], content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :], b"", None):
            folder = tmp_path / "bad"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good, folder)
            (folder / name).unlink()
            if bad is not None:
                (folder / name).write_bytes(bad)
            with pytest.raises(ArtefactError, match=name):
                Recommender.load(folder)
    with pytest.raises(ArtefactError, match="cannot be read"):
        Recommender.load(tmp_path / "nowhere")


def test_another_format_and_other_json_are_refused(exported: Export) -> None:
    folder = exported()
    path = folder / "manifest.json"
    content = read_json(path)
    changed = {**content, "format": 99}
    write_json(path, {**changed, "digest": digest(changed)})
    with pytest.raises(ArtefactError, match="is of format 99, and this runtime reads"):
        Recommender.load(folder)
    others: list[object] = [[], {}, {"format": 3}, 3, None]
    for other in others:
        write_json(path, other)
        with pytest.raises(ArtefactError, match="not the manifest of an exported model"):
            Recommender.load(folder)
    changed = {**content, "files": {"../escape": content["files"]["items.csv"]}}
    write_json(path, {**changed, "digest": digest(changed)})
    with pytest.raises(ArtefactError, match="escape"):
        Recommender.load(folder)
