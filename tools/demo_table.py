"""The demo's table in docs/demo.md: python -m tools.demo_table [--print]

Trains the embedded demo four ways over three seeds, one run after the other, into runs/table/, and keeps the summaries
in results/. `--print` only prints the table from those results; `python -m tools.tables` writes the page.
"""

import json
import os
import platform
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu" / "demo.json"
SEEDS = (0, 1, 2)
VARIANTS = {
    "as it comes: dither 0.05, `center_only`, GR": {},
    "`--dither-dead-groups apply`": {"dither_dead_groups": "apply"},
    "`--dither-dead-groups skip`": {"dither_dead_groups": "skip"},
    "`--dither-level 0`": {"dither_level": 0.0},
    "`--gr-gamma 0`": {"gr_gamma": 0.0},
}
KEPT = ("accuracy_before", "accuracy_after", "eval_problems", "steps", "seconds", "tokens_per_second", "time",
        "commit", "versions")  # fmt: skip


def measure() -> None:
    from redit_fast.training import config_file, trainer

    results = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "runs": {}}
    for name, change in VARIANTS.items():
        results["runs"][name] = {}
        for seed in SEEDS:
            run = {"seed": seed, "out_dir": "runs/table", "name": f"{len(results['runs'])}-{seed}", **change}
            summary = trainer.train(config_file.load(overrides=run))
            results["runs"][name][str(seed)] = {key: summary[key] for key in KEPT}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def table() -> str:
    """The Markdown table: held-out accuracy before and after RL for every seed, the gain, and the time of a run."""
    runs = json.loads(RESULTS.read_text())["runs"]
    lines = [
        f"| settings | {' | '.join(f'seed {seed}' for seed in SEEDS)} | mean gain | seconds, RL steps alone |",
        f"|---|{'---|' * len(SEEDS)}---|---|",
    ]
    for name, by_seed in runs.items():
        pairs = [(100 * run["accuracy_before"], 100 * run["accuracy_after"]) for run in by_seed.values()]
        cells = " | ".join(f"{before:.1f} → {after:.1f}" for before, after in pairs)
        gain = statistics.mean(after - before for before, after in pairs)
        rl = statistics.mean(
            sum(run["time"][phase] for phase in ("rollout", "reward", "pass1", "pass2", "optimizer"))
            for run in by_seed.values()
        )
        lines.append(f"| {name} | {cells} | {gain:+.1f} points | {rl:.0f} |")
    return "\n".join(lines)


def model_table() -> str:
    """The size of the model that the demo trains."""
    from redit_fast.training import builtin

    model, _ = builtin.build(0)
    count = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    sizes = config.num_hidden_layers, config.hidden_size, config.vocab_size, f"{count:,}"
    return f"| layers | width | vocabulary | parameters |\n|---|---|---|---|\n| {' | '.join(map(str, sizes))} |"


if __name__ == "__main__":
    if sys.argv[1:] != ["--print"]:
        measure()
    print(table())
