"""On processors before VNNI, where onnxruntime's faster 8-bit products saturate: the artefact computes the same bits there.

Valgrind plays such a processor: it has AVX2, and neither AVX-512, VNNI nor AMX.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sasrec.deploy import Recommender
from tests.conftest import ROOT
from tests.deploy.conftest import ITEMS

VALGRIND = shutil.which("valgrind")
# Scores of the models with the runtime's options, and of the first one without its option for such processors.
RUN = """
import sys
import numpy as np
import onnxruntime
from sasrec.deploy.recommender import Recommender

histories = np.load("histories.npy")
found = {name: Recommender.load(name).scores(histories) for name in sys.argv[1:]}
short = Recommender.load("four")
values, items = zip(*(short.top_k(short.encode(one[None]), 10, [one]) for one in histories))
assert short.shortlisted == len(histories)
found |= {"values": np.concatenate(values), "items": np.concatenate(items)}
add = onnxruntime.SessionOptions.add_session_config_entry
left_out = []

def other(self, key, value):
    if key == "session.x64quantprecision":
        left_out.append(key)
    else:
        add(self, key, value)

onnxruntime.SessionOptions.add_session_config_entry = other
found["saturated"] = Recommender.load(sys.argv[1]).scores(histories)
assert left_out
np.savez("found.npz", **found)
"""


@pytest.mark.skipif(VALGRIND is None, reason="no valgrind on this machine to play a processor without VNNI")
def test_eight_bits_do_not_saturate_without_vnni(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sasrec.deploy.artefact.FROM_ENTRIES", 1)
    folders = [exported("ptq", 8, "eight"), exported("pact", 8, "clipped"), exported("lsq", 4, "four")]
    names = [folder.name for folder in folders]
    histories = np.random.default_rng(0).integers(1, ITEMS + 1, (40, 8))
    np.save(tmp_path / "histories.npy", histories)
    command = [str(VALGRIND), "--tool=none", "-q", sys.executable, "-c", RUN, *names]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    models = {name: Recommender.load(folder) for name, folder in zip(names, folders, strict=True)}
    for name, model in models.items():
        assert (found[name] == model.scores(histories)).all(), name
    for i, one in enumerate(histories):
        values, items = models["four"].top_k(models["four"].encode(one[None]), 10, [one])
        assert (found["values"][i] == values[0]).all()
        assert (found["items"][i] == items[0]).all()
    # The processor that valgrind plays is one that needs the option.
    assert not (found["saturated"] == found["eight"]).all()
