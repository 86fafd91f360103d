"""python -m tests.budgets.count GROUP FILE: the group's counts, as JSON."""

import importlib
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"CI": "1", "OMP_WAIT_POLICY": "passive"}  # TRL sends telemetry otherwise
    import torch

    torch.set_num_threads(1)
    group, out = sys.argv[1:]
    Path(out).write_text(json.dumps(importlib.import_module(f"tests.budgets.{group}").count()))
