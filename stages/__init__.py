"""One thin script per stage of dvc.yaml: read the declared parameters, call the library, write the outputs."""

import os

import sasrec.guardian  # noqa: F401  # before torch, whose import takes a second: notes who started this process

# Read by OpenMP when torch is loaded: how long a thread that waits spins before it sleeps. The default spins so long that an
# epoch takes several times as long where another process wants the same cores; not to spin at all costs a third on an idle one.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
