"""Steps of TRL's GRPOTrainer, its own and with the swap-in: those rows of the suite step, on its first case.

python -m benchmarks.bench_trl
"""

from __future__ import annotations

import sys
from functools import partial

from .bench_step import of_host

tables = partial(of_host, "TRL")

if __name__ == "__main__":
    from .command import main

    sys.exit(main("trl", tables))
