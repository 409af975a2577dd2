"""Stage report: figures, the summary and the page, from what evaluate, baselines and benchmark wrote."""

from pathlib import Path

from sasrec.config import BASELINES, Study
from sasrec.files import remove, write_text
from sasrec.report import figures
from sasrec.report.bars import sensitivity as sensitivity_bars
from sasrec.report.page import render
from sasrec.report.results import best_method, load_results, load_stats
from sasrec.report.sensitivity import load_sensitivity
from sasrec.report.series import load_curves, load_latencies
from sasrec.report.tables import results_table, summary_csv, summary_rows
from stages.common import run

SECTIONS = ("models", "quantized", "variants", "seeds", "quant", "methods", "evaluate")
PLOTS = Path("plots")


def main(study: Study) -> None:
    # What variants of earlier studies left behind would change the hash of what this stage depends on.
    for old in Path("data/evaluated").iterdir():
        if old.name not in (*study.variants, *BASELINES):
            remove(old)
    results = load_results(study)
    stats = load_stats()
    curves = load_curves(study.variants, study.seeds)
    latencies = load_latencies(study.variants)
    sensitivity = load_sensitivity()
    figures.write_figure(PLOTS / "quality.png", figures.quality, results)
    figures.write_figure(PLOTS / "size.png", figures.size, results)
    figures.write_figure(PLOTS / "curves.png", figures.curves, curves, results)
    figures.write_figure(PLOTS / "latency.png", figures.latency, latencies)
    figures.write_figure(PLOTS / "sensitivity.png", sensitivity_bars, sensitivity.costs, sensitivity.full)
    drawn = ("quality", "size", "sensitivity", "curves", "latency")
    drawings = {name: (PLOTS / f"{name}.png").read_bytes() for name in drawn}
    rows = summary_rows(results)
    write_text(PLOTS / "summary.csv", summary_csv(rows))
    best = best_method(results.variants)
    page = render(results, stats, study.quant, drawings, best.name if best else None, study.methods, sensitivity)
    write_text(PLOTS / "report.html", page)
    print(results_table(rows), end="")
    print(f"report: {PLOTS / 'report.html'}")


if __name__ == "__main__":
    run(main, SECTIONS)
