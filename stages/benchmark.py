"""Time the first seed of an exported variant on this machine: python -m stages.benchmark VARIANT"""

from pathlib import Path

from sasrec.benchmarking import benchmark
from sasrec.config import Study
from sasrec.deploy.recommender import ArtefactError
from sasrec.errors import UserError
from sasrec.files import write_text
from sasrec.process import set_up
from stages.common import run

SECTIONS = ("seeds", "benchmark")


def main(study: Study, variant: str) -> None:
    set_up(study.benchmark.threads, "cpu")
    try:
        table = benchmark(Path("data/exported", variant, str(study.seeds[0])), study.benchmark)
    except ArtefactError as error:
        raise UserError(str(error)) from None
    write_text(Path("plots/benchmark", f"{variant}.csv"), table)
    print(table, end="")


if __name__ == "__main__":
    run(main, SECTIONS)
