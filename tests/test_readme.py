"""The README says what is so: its tables are the committed metrics, its parameters and files exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sasrec.deploy.service import Limits
from sasrec.report.readme import DOCUMENTS, filled
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_the_tables_are_the_committed_metrics(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = document.read_text(encoding="utf-8")
    assert text.count("<!-- table:") == text.count("<!-- end of table -->") >= 2
    assert filled(text, document) == text, "run python -m sasrec.report.readme"


def test_a_csv_file_is_shown_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("ties,hr@10\nhalf,0.5000\ntarget wins,0.75\n")
    text = f"<!-- table: {path} -->\n<!-- end of table -->"
    expected = "| ties | hr@10 |\n|---|---:|\n| half | 0.5000 |\n| target wins | 0.75 |\n"
    assert filled(text, Path("README.md")) == f"<!-- table: {path} -->\n{expected}<!-- end of table -->"


def test_every_reference_has_its_table() -> None:
    text = (ROOT / "metrics/reference/README.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "metrics/reference").glob("*.json")}
    assert set(re.findall(r"<!-- table: metrics/reference/(\S+\.json) -->", text)) <= files
    # The places of what is merged, or stands beside others' figures, may be empty yet.
    assert set(re.findall(r"<!-- (?:table|widths|beside): metrics/reference/(\S+\.json) -->", text)) >= files


def test_every_parameter_in_it_exists() -> None:
    params: Any = yaml.safe_load((ROOT / "params.yaml").read_text())
    keys = set(re.findall(r"-S '?([\w.]+)=", TEXT)) | set(
        re.findall(r"`((?:quant|train|model|dataset|methods)\.[\w.]+)`", TEXT)
    )
    assert len(keys) > 15
    for key in keys:
        value = params
        for part in key.split("."):
            assert part in value, key
            value = value[part]


def test_every_file_in_it_exists() -> None:
    for name in re.findall(r"\]\(([^)]+)\)", TEXT):
        if not name.startswith("http"):
            assert (ROOT / name.partition("#")[0]).exists(), name


def test_every_make_target_in_it_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\s+make (\w+)", TEXT, re.MULTILINE)) <= targets


def test_the_limits_of_a_request_are_those_of_the_service() -> None:
    limits = Limits()
    assert (
        f"at most {limits.users} histories of {limits.history:,} events, {limits.body_bytes // 1024} KiB in all, "
        f"and asks for at most {limits.k:,} items each"
    ) in TEXT
