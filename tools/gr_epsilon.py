"""What docs/epsilon.md shows: python -m tools.gr_epsilon [--draw | --print]

The built-in model, 0.24 million parameters, warm-started, with the on-policy loss -A logp of demonstrations and random
advantages of 1 and -1. For each epsilon and each of BATCHES batches: a gradient g1, the optimizer's own perturb(), a
gradient g2. The oracle is H g in float64 by double backward at the same (bfloat16) weights. Writes results/cpu/
gr_epsilon.json and docs/epsilon.png, from that file alone with --draw; --print prints the page's measured parts.
"""

import io
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

import redit_fast as rf
from redit_fast.benchmarks import machine, place
from redit_fast.pictures import BLUE, GREEN, GREY, ORANGE, STYLE
from redit_fast.training import builtin

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "gr_epsilon.json"
DEMO = RESULTS.with_name("demo.json")
PICTURE = ROOT / "docs" / "epsilon.png"
WARM_STEPS, BATCHES, ROWS, SEED = 60, 1024, 4, 0
RATIOS = [2.0**k for k in (-9, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 3)]  # |delta| / |ulp|
KINDS = {  # dtype of weights, activations and gradients; rounding of the step
    "float64": (torch.float64, "stochastic"),
    "float32": (torch.float32, "stochastic"),
    "bfloat16, stochastic": (torch.bfloat16, "stochastic"),
    "bfloat16, nearest": (torch.bfloat16, "nearest"),
}


def problems():
    """The model, its weights rounded to bfloat16, and (tokens, scored, advantages) of each batch."""
    torch.manual_seed(SEED)
    model, tokenizer = builtin.build(SEED)
    builtin.warm_start(model, tokenizer, steps=WARM_STEPS, seed=SEED)
    model.set_attn_implementation("eager")  # which has a double backward
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    pairs = builtin.demonstrations(BATCHES * ROWS, short=builtin.SHORT, seed=SEED + 1)
    batches = []
    for start in range(0, len(pairs), ROWS):
        rows = [(tokenizer(a)["input_ids"], tokenizer(b)["input_ids"]) for a, b in pairs[start : start + ROWS]]
        tokens = torch.zeros(ROWS, max(len(a) + len(b) for a, b in rows), dtype=torch.int64)
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (prompt, completion) in enumerate(rows):
            tokens[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            scored[i, len(prompt) : len(prompt) + len(completion)] = True
        batches.append((tokens, scored, torch.randint(2, (ROWS,)) * 2.0 - 1.0))
    return model, batches


def loss_of(model, batch):
    """The GRPO loss with ratio 1, as plain PyTorch: -A logp, mean over the scored tokens."""
    tokens, scored, advantages = batch
    logits = model(tokens[:, :-1], use_cache=False).logits
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    logp = torch.log_softmax(wide, -1).gather(-1, tokens[:, 1:, None])[..., 0]
    return -(advantages[:, None] * logp)[scored[:, 1:]].mean()


def perturbed(model):
    return rf.parameter_groups(model)[0]["params"]


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


def curvature_times_gradient(model, batch):
    """(g, H g) over the perturbed set, by double backward."""
    params = perturbed(model)
    grads = torch.autograd.grad(loss_of(model, batch), params, create_graph=True)
    product = sum((g * g.detach()).sum() for g in grads)
    return flat(grads), flat(torch.autograd.grad(product, params))


def units_in_the_last_place(params):
    """Of bfloat16, 8 bits of precision, at each weight."""
    return torch.cat([2.0 ** (torch.frexp(p.detach().double())[1].flatten() - 8) for p in params])


def measure() -> dict:
    model, batches = problems()
    oracle = model.double()
    start = time.perf_counter()
    true = [curvature_times_gradient(oracle, batch) for batch in batches]
    print(f"oracle {time.perf_counter() - start:.0f} s", flush=True)
    product = torch.stack([hg for _, hg in true]).mean(0)
    g_norm = torch.stack([g for g, _ in true]).norm(dim=1).mean().item()
    ulp = units_in_the_last_place(perturbed(oracle)).norm().item()
    results = {
        "machine": machine.card(place.here("cpu")),
        "parameters": sum(p.numel() for p in oracle.parameters()),
        "perturbed": len(product),
        "batches": BATCHES,
        "g_norm": g_norm,
        "weights_norm": flat(perturbed(oracle)).norm().item(),
        "ulp_norm": ulp,
        "curves": {},
    }
    exact = {}  # the float64 difference at each epsilon, which has no rounding, and the truncation error alone
    for kind, (dtype, rounding) in KINDS.items():
        model = model.to(dtype)
        firsts = []
        for batch in batches:
            model.zero_grad()
            loss_of(model, batch).backward()
            firsts.append([p.grad for p in model.parameters()])
        points = []
        for ratio in RATIOS:
            epsilon = ratio * ulp / g_norm
            difference, seen = torch.zeros_like(product), []
            for seed, (batch, first) in enumerate(zip(batches, firsts, strict=True)):
                for p, grad in zip(model.parameters(), first, strict=True):
                    p.grad = grad.clone()
                g1 = flat(p.grad for p in perturbed(model))
                optimizer = rf.RegularizedAdamW(
                    rf.parameter_groups(model), gamma=epsilon, epsilon=epsilon, rounding=rounding, seed=seed
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of the low cosine
                    assert optimizer.perturb()
                    loss_of(model, batch).backward()
                    difference += (flat(p.grad for p in perturbed(model)) - g1) / (epsilon * BATCHES)
                    seen.append(optimizer.metrics())
                    optimizer.restore()
            exact.setdefault(ratio, difference)
            error, rounding_error = (
                ((difference - wanted).norm() / wanted.norm()).item() for wanted in (product, exact[ratio])
            )
            cosine, gain = (sum(m[f"gr/step_{name}"] for m in seen) / BATCHES for name in ("cos", "gain"))
            points.append({"ratio": ratio, "epsilon": epsilon, "cosine": cosine, "gain": gain, "error": error,
                           "rounding_error": rounding_error})  # fmt: skip
            print(f"{kind:22} |delta|/ulp {ratio:8.4f}  epsilon {epsilon:.1e}  cosine {cosine:.3f}  gain {gain:.3f}  "
                  f"error {error:.3g}, of rounding alone {rounding_error:.3g}", flush=True)  # fmt: skip
        results["curves"][kind] = points
    return results


STYLES = {  # float32 below, where it lies under stochastic rounding
    "float32": {"color": GREEN, "linewidth": 4, "alpha": 0.5, "solid_capstyle": "butt"},
    "bfloat16, nearest": {"color": ORANGE},
    "bfloat16, stochastic": {"color": BLUE},
}
ERRORS = {1: "1", 0.3: "0.3", 0.1: "0.1", 0.03: "0.03", 0.01: "0.01"}
TICKS = {1 / 512: "1/512", 1 / 64: "1/64", 1 / 8: "1/8", 1: "1", 8: "8"}


def figure(results) -> Figure:
    """Cosine, gain and the errors of (g2 - g1) / epsilon over |delta| / |ulp|."""
    drawn = Figure(figsize=(11, 4.1), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.12, h_pad=0.06, rect=(0, 0, 1, 0.92))
    cosine, gain, error = drawn.subplots(1, 3)
    for kind, style in STYLES.items():
        points = results["curves"][kind]
        for axes, key in ((cosine, "cosine"), (gain, "gain"), (error, "rounding_error")):
            axes.plot([p["ratio"] for p in points], [p[key] for p in points], label=kind, **style)
    exact = results["curves"]["float64"]
    error.plot([p["ratio"] for p in exact], [p["error"] for p in exact], color=GREY, linestyle="--",
               label="the step's length itself, in any dtype")  # fmt: skip
    for axes, name, label in (
        (cosine, "Direction of the step as taken", "cosine with the intended step"),
        (gain, "Length along the intended step", "gain: 1 is all of it"),
        (error, "Error of (g2 - g1) / epsilon", f"relative, of the mean of {results['batches']} batches"),
    ):
        axes.set_title(name)
        axes.set_ylabel(label)
        axes.set_xlabel("|delta| / |ulp|, step in bfloat16 units")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(list(TICKS)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels(TICKS.values())
        axes.set_xlim(RATIOS[0], RATIOS[-1])
    for axes in (cosine, gain):
        axes.set_ylim(-0.03, 1.12)
    cosine.axhline(0.9, color=GREY, linewidth=0.9, linestyle=":")
    cosine.text(RATIOS[0] * 1.15, 0.845, "a warning below 0.9", color=GREY, fontsize=8.5)
    error.set_yscale("log")
    error.set_ylim(0.004, 1.6)
    error.yaxis.set_major_locator(FixedLocator(list(ERRORS)))
    error.yaxis.set_minor_locator(NullLocator())
    error.set_yticklabels(ERRORS.values())
    worst = max(p["rounding_error"] for p in results["curves"]["float32"])
    error.text(7, 0.0047, f"float32: at most {worst:.0e}, below", color=GREEN, fontsize=8.5, ha="right")
    drawn.legend(*error.get_legend_handles_labels(), loc="upper left", ncols=4, bbox_to_anchor=(0.04, 1.0))
    return drawn


def draw(results) -> bytes:
    """The picture, with its curves as its description: its bytes are matplotlib's and its fonts'."""
    picture = io.BytesIO()
    with rc_context(STYLE):
        description = {"Description": json.dumps(results["curves"])}
        figure(results).savefig(picture, format="png", dpi=150, metadata=description)
    return picture.getvalue()


def curves_table(results) -> str:
    curves = results["curves"]
    lines = [
        "| step: \\|delta\\| / \\|ulp\\| | epsilon here | nearest: cosine | gain | error | stochastic: cosine | gain "
        "| error | float32: error | error of the length |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for i, exact in enumerate(curves["float64"]):
        ratio = exact["ratio"]
        cells = [f"1/{1 / ratio:.0f}" if ratio < 1 else f"{ratio:.0f}", f"{exact['epsilon']:.1g}"]
        for kind in ("bfloat16, nearest", "bfloat16, stochastic"):
            point = curves[kind][i]
            cells += [f"{point['cosine']:.2f}", f"{point['gain']:.2f}", f"{point['rounding_error']:.2g}"]
        cells += [f"{curves['float32'][i]['rounding_error']:.1g}", f"{exact['error']:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scale(results) -> str:
    """What turns epsilon |g1| into the picture's axis, for a model of any size."""
    share = results["weights_norm"] / results["ulp_norm"]
    norm = 0.02 * 5e8**0.5
    return (
        f"\\|ulp\\| is \\|theta\\| / {share:.0f} here, and a 128th to a 256th of it for any bfloat16 weights, so that "
        f"\\|delta\\| / \\|ulp\\| is about {share:.0f} epsilon \\|g1\\| / \\|theta\\|.\n"
        f"Half a billion weights of deviation 0.02 have \\|theta\\| = {norm:.0f}: with \\|g1\\| = 1 and the paper's "
        f"epsilon of 1e-3 that is {share * 1e-3 / norm:.0e}, left of the picture."
    )


def halved(results) -> str:
    """Stochastic rounding's error over nearest's up to a quarter of a unit: of rounding alone, and against H g."""
    nearest, stochastic = (results["curves"][f"bfloat16, {rounding}"] for rounding in ("nearest", "stochastic"))
    pairs = [(a, b) for a, b in zip(nearest, stochastic, strict=True) if a["ratio"] <= 0.25]
    steps = [f"1/{1 / a['ratio']:.0f}" for a, _ in pairs]
    lines = [f"| stochastic's error over nearest's | {' | '.join(steps)} |", "|---" * (len(pairs) + 1) + "|"]
    for name, key in (("of rounding alone", "rounding_error"), ("against H g, the length's included", "error")):
        lines.append(f"| {name} | {' | '.join(f'{b[key] / a[key]:.2f}' for a, b in pairs)} |")
    return "\n".join(lines)


def cost() -> str:
    """What pass 2 takes in the demo, over its three seeds."""
    runs = json.loads(DEMO.read_text())["runs"]
    times = [run["time"] for run in runs["`--dither-dead-groups apply`"].values()]
    without = [run["time"] for run in runs["`--gr-gamma 0`"].values()]
    total = sum(time[phase] for time in times for phase in ("rollout", "reward", "pass1", "pass2", "optimizer"))
    second = sum(time["pass2"] for time in times)
    update = sum(time[phase] for time in times for phase in ("pass1", "pass2", "optimizer"))
    plain = sum(time["pass1"] + time["optimizer"] for time in without)
    return (
        f"In the embedded demo, on two CPU cores and over three seeds, pass 2 takes {second / total:.0%} of the RL "
        "steps' time, and the policy\nupdate (both passes and the optimizer) "
        f"{update / plain:.1f} times what it takes with gamma 0."
    )


def blocks() -> dict[str, str]:
    """What docs/epsilon.md has between its markers, from the committed results alone."""
    results = json.loads(RESULTS.read_text())
    return {"curves": curves_table(results), "scale": scale(results), "halved": halved(results), "cost": cost()}


if __name__ == "__main__":
    if sys.argv[1:] not in (["--draw"], ["--print"]):
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    if sys.argv[1:] != ["--print"]:
        PICTURE.write_bytes(draw(json.loads(RESULTS.read_text())))
    for name, text in blocks().items():
        print(f"<!-- {name} -->\n{text}\n<!-- end of {name} -->\n")
