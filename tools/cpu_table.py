"""The table of speeds on the CPU in docs/benchmarks.md, from benchmarks/results/cpu/*.json: python -m tools.cpu_table

The files come from `python -m benchmarks.bench_token_loss --json benchmarks/results/cpu/token_loss.json`, and params
likewise, on a machine that does nothing else. `python -m tools.tables` writes the page, and a test compares it.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu"


def table() -> str:
    """The Markdown table: every row of ours in the token losses, the head and the optimizer's steps."""
    lines = [
        "| | ms | speed, of a copy's | times faster than |",
        "|---|---|---|---|",
    ]
    for name in ("token_loss", "linear_loss", "params"):
        for title, rows in json.loads((RESULTS / f"{name}.json").read_text())["tables"].items():
            if name == "params" and not title.startswith("step, "):
                continue
            for row in rows:
                if row["ratios"]:
                    ratios = ", ".join(f"{other} {ratio:.1f}" for other, ratio in row["ratios"].items())
                    what = f"{title.replace('torch.', '')}: {row['name'].removesuffix(', bfloat16')}"
                    speed = f"{row['gb_per_s']:.0f} GB/s, {row['of_copy']:.0%}"
                    if row.get("gflop_per_s"):
                        speed = f"{row['gflop_per_s']:.0f} GFLOP/s"
                    lines.append(f"| {what} | {row['ms']:.1f} | {speed} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
