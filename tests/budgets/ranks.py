"""What two ranks send in a step with GR, of two micro-batches each and a model of six layers."""

import tempfile

from tests.training import rank_steps


def count():
    with tempfile.TemporaryDirectory() as folder:
        found = {strategy: rank_steps.counted(strategy, folder) for strategy in ("ddp", "fsdp2")}
    return {
        f"a step of two ranks, {strategy}": {"collectives": steps["collectives"], "bytes sent": steps["bytes sent"]}
        for strategy, steps in found.items()
    }
