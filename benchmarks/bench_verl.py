"""Steps of verl's TrainingWorker, with its heads and with ours: those rows of the suite step, on its first case.

python -m benchmarks.bench_verl
"""

from __future__ import annotations

import sys
from functools import partial

from .bench_step import of_host

tables = partial(of_host, "verl")

if __name__ == "__main__":
    from .command import main

    sys.exit(main("verl", tables))
