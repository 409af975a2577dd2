"""Check all of params.yaml before anything runs: python -m stages.check

A stage checks the file, too, but only when it runs. Names in the lists (models, quantized, variants) become files that DVC
looks for first, and its message then names the file, not the nearest name.
"""

from sasrec.config import Study
from sasrec.quant.attach import load_method
from stages.common import run

SECTIONS = ("models", "methods", "per_model", "model", "train")


def main(study: Study) -> None:
    for model in study.models:
        study.of_model(model)
    for name, options in study.methods.items():
        load_method(name, options)
    print("params.yaml is in order")


if __name__ == "__main__":
    run(main, SECTIONS)
