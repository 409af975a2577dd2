"""One thin script per stage of dvc.yaml: read the declared parameters, call the library, write the outputs."""

import os

import sasrec.guardian  # noqa: F401  # before torch, whose import takes a second: notes who started this process

# Read by OpenMP when torch is loaded. Threads that spin while they wait are a few per cent faster on an idle machine, and
# up to ten times slower where another process wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
