"""Writes every measured or derived table of the README and of docs/ between its markers: python -m tools.tables

A test compares them. Their numbers come from benchmarks/results/ and from the code, never from here.
"""

import re
import tomllib
from functools import partial
from pathlib import Path

from redit_fast.benchmarks import SUITES
from redit_fast.benchmarks.reproduction import NAMES
from redit_fast.benchmarks.reproduction.__main__ import OUT
from redit_fast.benchmarks.reproduction.page import summary
from redit_fast.benchmarks.reproduction.runner import Store
from tools import bench_tables, demo_table, step_picture

ROOT = Path(__file__).parent.parent
OPS = {  # rows of the status table -> the primitives that they call; none: plain PyTorch everywhere
    "`group_advantages`": ("group_advantages",),
    "`policy_loss`": (),
    "`token_logp`, `grpo_loss`": ("token_logp", "token_logp_grad", "token_loss", "scale_in_place"),
    "`linear_logp`, `linear_grpo_loss`": ("exp_product", "exp_product_grad", "addmm", "scale_in_place"),
    "`RegularizedAdamW`, `GradientRegularizer`": ("squared_norm", "perturb", "combine", "adamw"),
}
RUN = {  # backend -> column, and where its tests have run
    "reference": ("reference (PyTorch)", "CPU"),
    "cpu": ("CPU (C++)", "x86-64: AVX-512, AVX2, baseline; emulated ARM: noise and token losses"),
    "triton": ("Triton", "its interpreter on the CPU; compiled for sm_80, sm_90, sm_100; no GPU yet"),
    "cuda": ("CUDA", "nvcc's PTX, interpreted on the CPU"),
}
HOSTS = {  # name in SUPPORTED -> what a user writes, page
    "TRL": (
        "`with redit_fast.integrations.trl.patch(trainer, dither_level=0.05, gr_gamma=1e-3): trainer.train()`",
        "trl",
    ),
    "transformers": ("`with rf.apply_to(model): Trainer(model, args, train_dataset=data).train()`", "transformers"),
    "verl": ("`algorithm.adv_estimator=redit_grpo +algorithm.redit.dither_level=0.05`", "verl"),
    "OpenRLHF": ("`ppo_actor.PolicyLoss = redit_fast.integrations.openrlhf.PolicyLoss`", "openrlhf"),
}
DEPENDENCIES = {
    "torch": "everything",
    "transformers": "models and tokenizers",
    "huggingface_hub": "models by name; transformers brings it anyway",
    "httpx2": "requests to a server of rollouts; huggingface_hub 2 brings it anyway",
    "safetensors": "checkpoints without pickle",
    "pyyaml": "configuration files",
    "pydantic": "checking them",
    "jinja2": "the report's page, errors of chat templates",
    "rich": "progress and tables",
    "matplotlib": "the picture of its curves",
}
UNSLOTH = (
    "| Unsloth | 2026.10.9, on the CPU | `import unsloth` first, then the trainer for TRL "
    "| [page](docs/integrations/unsloth.md) |"
)


def status() -> str:
    """Which backend has which op, and where the backends have run."""
    lines = [f"| op | {' | '.join(column for column, _ in RUN.values())} |", "|---" * (1 + len(RUN)) + "|"]
    for op, primitives in OPS.items():
        cells = [_state(backend, primitives) for backend in RUN]
        lines.append(f"| {op} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| has run on | {' | '.join(where for _, where in RUN.values())} |"])


def _state(backend: str, primitives: tuple[str, ...]) -> str:
    if not primitives:
        return "yes" if backend == "reference" else "no need"
    folder = ROOT / "redit_fast" / "backends"
    sources = "".join(path.read_text() for path in [*folder.glob(f"{backend}.py"), *folder.glob(f"{backend}/*.py")])
    return "yes" if all(f"\ndef {name}(" in sources for name in primitives) else "not yet"


def supported() -> dict[str, str]:
    """Host -> the versions that the tests run, from the SUPPORTED beside its hooks; no host is imported."""
    sources = [path.read_text() for path in sorted((ROOT / "redit_fast" / "integrations").rglob("*.py"))]
    found = [re.search(r'^SUPPORTED = "(.*)"  # (?:of (\w+))?', source, re.M) for source in sources]
    pairs = [(m[2], m[1]) if m[2] else m[1].split() for m in found if m]
    return {host: versions.replace("..", " to ") for host, versions in pairs}


def hosts() -> str:
    """The swap-ins."""
    versions, lines = supported(), ["| host | versions | one line | more |", "|---|---|---|---|"]
    for host, (line, page) in HOSTS.items():
        lines.append(f"| {host} | {versions[host]} | {line} | [page](docs/integrations/{page}.md) |")
    return "\n".join([*lines, UNSLOTH])


def lower_bounds() -> dict[str, str]:
    """torch and what the extra train brings -> the oldest version that pyproject.toml takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(line.split(">=") for line in [*project["dependencies"], *project["optional-dependencies"]["train"]])


def dependencies() -> str:
    """What is installed for the ops and for the trainer, and why."""
    bounds = lower_bounds()
    rows = [f"| {name} | {bounds[name]} | {reason} |" for name, reason in DEPENDENCIES.items()]
    return "\n".join(["| package | oldest | used for |", "|---|---|---|", *rows])


def claims() -> str:
    """What came of both papers' claims; `python -m redit_fast.benchmarks.reproduction page` writes it too."""
    return summary({name: Store(ROOT / OUT, name).runs for name in NAMES})


BLOCKS = {  # page, marker -> what stands there
    ("README.md", "status"): status,
    ("README.md", "hosts"): hosts,
    ("docs/install.md", "dependencies"): dependencies,
    ("docs/demo.md", "model"): demo_table.model_table,
    ("docs/demo.md", "demo table"): demo_table.table,
    ("README.md", "benchmarks"): bench_tables.readme,
    ("README.md", "claims"): claims,
    ("docs/benchmarks.md", "machine"): bench_tables.machine,
    ("docs/benchmarks.md", "retest"): bench_tables.retest,
    **{("docs/benchmarks.md", name): partial(bench_tables.suite, name) for name in SUITES if name != "ranks"},
    ("docs/benchmarks.md", "ranks"): bench_tables.ranks,
    ("docs/benchmarks.md", "ranks run"): bench_tables.ranks_run,
    ("docs/benchmarks.md", "absent"): bench_tables.absent,
    ("docs/benchmarks.md", "goals"): bench_tables.goals,
    ("docs/benchmarks.md", "growth"): bench_tables.growth,
    ("docs/benchmarks.md", "instructions"): bench_tables.instructions,
    ("docs/benchmarks.md", "step clock"): bench_tables.step_clock,
    ("docs/integrations/trl.md", "step"): lambda: step_picture.table("TRL", step_picture.NAMES | step_picture.GR_NAMES),
    ("docs/integrations/verl.md", "step"): lambda: step_picture.table(
        "verl", step_picture.NAMES | step_picture.GR_NAMES
    ),
    ("docs/integrations/transformers.md", "step"): lambda: step_picture.table("apply"),
    ("docs/integrations/transformers.md", "apply table"): step_picture.apply_table,
}


def block(marker: str, text: str) -> str:
    return f"<!-- {marker} -->\n{text}\n<!-- end of {marker} -->"


def write() -> None:
    for (name, marker), make in BLOCKS.items():
        page = ROOT / name
        before, _, rest = page.read_text().partition(f"<!-- {marker} -->")
        _, end, after = rest.partition(f"<!-- end of {marker} -->")
        if not end:
            raise SystemExit(f"{name} must have the markers of {marker!r}, got none")
        page.write_text(before + block(marker, make()) + after)


if __name__ == "__main__":
    write()
