"""The stage as a whole, the page, the figures' layout, and the sentences."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sasrec.config import QuantParams, Study
from sasrec.errors import UserError
from sasrec.mapping import from_mapping
from sasrec.report.findings import answer, details, width_text
from sasrec.report.layout import side_by_side, spread
from sasrec.report.page import _levels
from sasrec.report.results import Comparison, Results, best_method, load_results
from stages.report import main
from tests.report.conftest import RANKS

FIGURES = ("quality.png", "size.png", "sensitivity.png", "curves.png", "latency.png")
VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Collects elements, and whether they are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def page(folder: Path, study: Study) -> str:
    main(study)
    return Path("plots/report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(page: str) -> None:
    elements = Reader(page).elements
    assert not {tag for tag, _ in elements} & {"script", "link", "iframe", "object"}
    addresses = [value or "" for _, attributes in elements for key, value in attributes.items() if key in ("src", "href")]
    assert len(addresses) == len(FIGURES) and all(value.startswith("data:image/png;base64,") for value in addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page) and "url(" not in page


def test_the_page_can_be_read_by_everyone(page: str) -> None:
    elements = Reader(page).elements
    metas = [attributes for tag, attributes in elements if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert "prefers-color-scheme: dark" in page
    assert all(attributes["alt"] for tag, attributes in elements if tag == "img")
    tags = [tag for tag, _ in elements]
    assert tags.count("table") == tags.count("caption") == 5 + 2 + 2  # the last: of the tensors of ptq and lsq
    assert ("html", {"lang": "en"}) in elements


def test_the_page_tells_everything(page: str, study: Study) -> None:
    for name in (*study.variants, "popularity", "markov"):
        assert f'<th scope="row">{name}</th>' in page
    assert '<tr class="chosen"><th scope="row">lsq</th>' in page
    assert "run by their own runtime" in page
    assert "differ by at most 1 integer step (lsq)" in page
    assert "dvc exp run -S quant.bits=4" in page
    assert "$" not in re.sub(r"base64,[^\"]*", "", page)


def test_same_numbers_same_bytes(folder: Path, study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"plots/{name}" for name in (*FIGURES, "summary.csv", "report.html")]
    main(study)
    first = [Path(name).read_bytes() for name in names]
    main(study)
    assert [Path(name).read_bytes() for name in names] == first
    assert all(len(content) < 150_000 for content in first[: len(FIGURES)])
    assert capsys.readouterr().out.endswith("report: plots/report.html\n")
    assert not list(Path("plots").glob(".*"))


@pytest.mark.parametrize("variants", [("sasrec",), ("ptq",), ("lsq", "sasrec"), ("control",)])
def test_part_of_a_study(folder: Path, study: Study, variants: tuple[str, ...]) -> None:
    for name in ("popularity", "markov"):
        Path(f"metrics/{name}.json").unlink()
    main(replace(study, variants=variants))
    Reader(Path("plots/report.html").read_text(encoding="utf-8"))


def test_the_report_does_not_import_torch() -> None:
    check = "import sys, stages.report, sasrec.report.show; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[2], check=False).returncode == 0


def comparison(reference: str, difference: float, noise: float) -> Comparison:
    return Comparison(reference, 0.5, difference, difference - noise, difference + noise, 0, 0, 0)


def test_the_choice_is_made_on_validation(folder: Path, study: Study) -> None:
    results = load_results(study)
    best = best_method(results.variants)
    assert best is not None and best.name == "lsq"
    for variant in results.variants:
        variant.metrics["valid_ndcg@10"] = {"ptq": 0.9}.get(variant.name, 0.1)
    assert "choose ptq: of 2 methods it has the highest NDCG@10 on validation (0.9000)." in answer(results, study.quant)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (0.1, "It beats plain post-training quantization (ptq) by +20.0 % (95 % interval +18.0 % to +22.0 %)."),
        (0.005, "cannot be told apart from it: lsq against ptq is +1.0 % (95 % interval −1.0 % to +3.0 %)."),
        (-0.1, "it is below plain post-training quantization (ptq): −20.0 %"),
    ],
)  # fmt: skip
def test_what_the_choice_gains_over_ptq(folder: Path, study: Study, difference: float, words: str) -> None:
    loaded = load_results(study)
    compared = {**loaded.comparisons, ("lsq", "ptq"): comparison("ptq", difference, 0.01)}
    assert words in answer(Results(loaded.variants, compared), study.quant)


def test_sentences_say_within_noise_only_when_it_is(folder: Path, study: Study) -> None:
    loaded = load_results(study)
    for difference, words in (
        (-0.1, "That is a loss beyond noise."),
        (0.001, "That is within noise."),
        (0.1, "a gain beyond noise."),
    ):
        compared = {**loaded.comparisons, ("lsq", "control"): comparison("control", difference, 0.01)}
        text = answer(Results(loaded.variants, compared), study.quant)
        assert words in text
        assert "8.0 times smaller than sasrec in full precision (80.0 kB)" in text


def test_sequential_models_against_the_baselines(folder: Path, study: Study) -> None:
    (sentence,) = [text for text in details(load_results(study), study.quant) if text.startswith("sasrec reaches")]
    assert "NDCG@10 0.5667, 9.4 times that of popularity (+0.5065, 95 % interval" in sentence
    assert "that of first-order Markov" in sentence


def test_widths_in_words() -> None:
    assert width_text(QuantParams(bits=4)) == "4 bits"
    mixed = QuantParams(bits=8, weight_bits=4, embedding_bits=1)
    assert width_text(mixed) == "4 bits for weights, 8 bits for activations and 1 bit for embeddings"


def test_labels_are_spread_with_the_least_shift() -> None:
    assert spread(np.array([5.0, 5.0, 20.0]), 2, 0, 30).tolist() == [4, 6, 20]
    assert spread(np.array([1.0, 0.0]), 2, 0, 30).tolist() == [2, 0]
    assert spread(np.array([29.0, 30.0]), 2, 0, 30).tolist() == [28, 30]


def test_equal_sizes_stand_side_by_side() -> None:
    assert side_by_side(np.array([1.0, 4.0, 1.0]), 0.5).tolist() == [0.75, 4, 1.25]


def test_the_page_says_how_many_levels_each_method_has(page: str) -> None:
    table = page[page.index('aria-label="Levels"') :]
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', table[: table.index("</table>")])
    assert {name: re.findall(r"<td>(\d+)<", cells) for name, cells in rows} == {"ptq": ["16"] * 3, "lsq": ["16"] * 3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "The control shows what training on does by itself"),
        ({"init": "scratch"}, "The control is trained from scratch"),
        ({"preset": "source"}, "The control is trained from scratch"),
    ],
)
def test_the_page_says_what_the_control_is(folder: Path, study: Study, changes: dict[str, str], said: str) -> None:
    sentences = details(load_results(study), from_mapping(QuantParams, changes, "quant"))
    assert sum(sentence.startswith("The control") for sentence in sentences) == 1
    assert any(sentence.startswith(said) for sentence in sentences)


def test_strange_files_beside_the_variants_are_swept_away(folder: Path, study: Study) -> None:
    (folder / "data/evaluated/.DS_Store").write_text("")
    main(study)
    assert not (folder / "data/evaluated/.DS_Store").exists()


def test_signed_activations_of_apot_have_a_level_less(folder: Path, study: Study) -> None:
    variants = tuple(replace(one, name="apot") if one.name == "lsq" else one for one in load_results(study).variants)
    row = _levels(Results(variants, {}), study.quant, {})
    cells = re.findall(r"<td>([^<]+)<", row[row.index('<th scope="row">apot') :])
    assert cells == ["15", "15", "15 or 16"]


def test_what_pq_leaves_in_full_precision_has_no_levels(folder: Path, study: Study) -> None:
    variants = tuple(replace(one, name="pq") if one.name == "lsq" else one for one in load_results(study).variants)
    for rest, left in (("none", 2), ("lsq", 0)):
        table = _levels(Results(variants, {}), study.quant, {"pq": {"rest": rest}})
        row = table[table.index('<th scope="row">pq') :]
        assert row.count("full precision") == left and row.count("16<small>0 among them") == 3 - left


def test_the_page_shows_mixed_widths_beside_uniform_ones(page: str) -> None:
    table = page[page.index('aria-label="Mixed widths"') :]
    table = table[: table.index("</table>")].replace("&nbsp;", " ")
    rows = re.findall(r'<th scope="row">([^<]+)</th><td>([\d,]+)</td><td>([^<]+)</td><td class="text">([^<]*)</td>', table)
    assert rows == [
        ("8 bits", "2,048", "+0.0010", "2 at 8"),
        ("4 bits", "1,050", "+0.0300", "2 at 4"),
        ("mixed, no more bytes than 4 bits", "1,040", "+0.0200", "1 at 4, 1 at 3"),
        ("mixed, no more loss than 4 bits", "900", "+0.0250", "1 at 8, 1 at 3"),
    ]
    assert "full precision (2.0000 nats)" in table


def test_a_broken_sensitivity_table_is_named_with_its_line(folder: Path, study: Study) -> None:
    path = Path("plots/mixed.csv")
    path.write_text(path.read_text().replace(",0.020000,", ",much,"))
    with pytest.raises(UserError, match=r"plots/mixed\.csv, line 5 is not what the stage sensitivity writes"):
        main(study)
    path.unlink()
    with pytest.raises(UserError, match=r"plots/mixed\.csv does not exist"):
        main(study)


def test_methods_that_cannot_be_told_apart_are_tied(folder: Path, study: Study, writer: Callable[..., None]) -> None:
    RANKS["pact"], RANKS["ste"] = RANKS["lsq"], [1, 1, 1, 1, 1]
    try:
        writer("pact")
        writer("ste")
        results = load_results(replace(study, quantized=("ptq", "lsq", "pact", "ste"), variants=("ptq", "lsq", "pact", "ste")))
    finally:
        del RANKS["pact"], RANKS["ste"]
    for variant in results.variants:
        variant.metrics["valid_ndcg@10"] = {"lsq": 0.9}.get(variant.name, 0.1)
    compared = {**results.comparisons, ("lsq", "pact"): comparison("pact", 0, 0.01)}
    text = answer(Results(results.variants, compared | {("lsq", "ste"): comparison("ste", -0.1, 0.01)}), study.quant)
    assert "Tied with lsq, as the intervals of their paired differences include 0: pact." in text
    assert "On the test items ste did better than lsq, beyond noise." in text
    assert {("lsq", "ptq")} <= set(results.comparisons)


def test_the_page_says_how_the_models_run_and_compute(page: str) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.replace("&nbsp;", " ")))
    assert "torch eager ms" in text and "torch.compile ms" not in text  # what was not measured has no column
    assert "lsq 1 1.5 0.2 588 3.25 lsq 32 4 1 6400 9.75" in text
    assert "Threads: 1. Processor: avx2 avx512_vnni." in text
    assert "lsq 10000 13 61" in text
    assert "item_table.weight 4 31 x 16 int8 int32 248" in text
    assert "Activations: 8 bits. Left in float32: 2 Softmax, 9 Add; matrix products: none." in text
    assert "coarse.item_table.rows.0 4 31 none none 16" in text
    assert "lsq: 2 stored tensors, one by one" in text and "sasrec: 2 stored" not in text


def test_a_model_that_evaluate_did_not_describe_is_named(folder: Path, study: Study) -> None:
    Path("data/evaluated/lsq/tensors.json").unlink()
    with pytest.raises(UserError, match=r"data/evaluated/lsq/tensors.json does not exist; run `dvc repro`"):
        main(study)
