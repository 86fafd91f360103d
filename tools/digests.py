"""A digest of every result of the library, one a line, to show that a change moves code and no number:

python tools/digests.py --states before > before.txt  # before the change; keeps optimizer states and a checkpoint
python tools/digests.py --load before > after.txt     # after it: the same lines, from the kept states
diff before.txt after.txt

Outputs and gradients of every op and loss on every backend of this machine, GR's steps, a ten-step demo run and one
that stops after five steps and is resumed. TRITON_INTERPRET=1 in the environment adds Triton's interpreter.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import redit_fast as rf
from redit_fast import backends

B, T, D, V = 5, 7, 48, 523
LOSSES = {
    "grpo": {"delta": 1.5, "beta": 0.1, "kl": "k1"},
    "bnpo": {"dual_clip": 3.0},
    "dr_grpo": {"max_completion_length": 16},
    "dapo": {"beta": 0.05, "kl_ratio_correction": True, "correction": "token_truncate"},
    "cispo": {"cispo_bound": "relative"},
    "sapo": {"beta": 0.1, "kl": "abs"},
    "luspo": {"importance": "sequence"},
    "vespo": {"correction": "token_mask"},
    "gspo": {"correction": "sequence_mask"},
    "gspo_token": {},
    "gmpo": {"top_entropy_quantile": 0.5},
    "gpg": {"beta": 0.1, "kl": "k2"},
    "reinforce": {"entropy_coef": 0.01},
    "rloo": {},
    "dppo_tv": {},
    "dppo_kl": {},
    "clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": -1.0},
    "kl_cov": {"kl_cov_ratio": 0.2},
    "dro": {"dro_beta": 0.3, "off_policy_mask_threshold": 0.1},
}
ADVANTAGES = {
    "plain": {},
    "gaussian": {"dither": rf.Dither(seed=7), "step": 3},
    "uniform": {"dither": rf.Dither("uniform", 0.1, schedule="cosine", seed=2**63 + 1), "step": 1500},
    "skip": {"dither": rf.Dither(dead_groups="skip")},
    "center_only": {"dither": rf.Dither(dead_groups="center_only")},
    "only": {"dither": rf.Dither(dead_groups="only")},
    "leave_one_out": {"baseline": "leave_one_out", "scale": "none"},
    "batch": {"scale": "batch", "ddof": 0, "eps": 1e-6},
    "normalize_then_sum": {"combine": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
}
OPTIMIZERS: dict[str, dict] = {
    "equal": {"gamma": 0.01, "epsilon": 0.01},
    "folded": {"gamma": 0.005, "epsilon": 0.01, "keep_first_grad": False},
    "kept": {"gamma": 0.005, "epsilon": 0.01, "keep_first_grad": True},
    "normalized": {"gamma": 0.01, "epsilon": 0.05, "normalized": True, "max_norm": None},
    "warm": {"gamma": 0.01, "epsilon": 0.01, "gamma_warmup_steps": 3, "every_k_steps": 2},
    "auto": {"epsilon": "auto"},
    "off": {"gamma": 0.0},
}


def digest(*values: object) -> str:
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else repr(value.item()).encode())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:16]


def say(name: str, *values: object) -> None:
    print(f"{digest(*values)}  {name}", flush=True)


def metrics_of(out: rf.LossOutput) -> list[object]:
    return [f"{name}={value.item()!r}" for name, value in sorted(out.metrics.items())]


def rows(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logits, targets = 2 * normal(B, T, V), torch.randint(V, (B, T), generator=generator)
    logits[0, 0] *= 60  # a row that is repaired
    logits[1, 1, 5] = -torch.inf
    targets[2, 3], logp = -100, torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0].clamp(-12)
    found = {
        "logits": logits.to(dtype),
        "hidden": normal(B, T, D).to(dtype),
        "weight": (0.3 * normal(V, D)).to(dtype),
        "bias": normal(V).to(dtype),
    }
    found |= {name: logp + 0.2 * normal(B, T) for name in ("old_logp", "ref_logp", "sampling_logp")}
    return found | {"targets": targets, "advantages": normal(B), "mask": torch.rand(B, T, generator=generator) > 0.2}


def ops(dtype: torch.dtype, name: str) -> None:
    x = rows(dtype)
    for softcap in (None, 20.0):
        how = {"temperature": 0.8, "logit_scale": 0.9, "softcap": softcap, "mask": x["mask"]}
        for entropy in ("none", "metric", "grad"):
            for op, inputs in (("token_logp", ("logits",)), ("linear_logp", ("hidden", "weight"))):
                leaves = [x[key].clone().requires_grad_() for key in inputs]
                more = {"bias": x["bias"], "chunk_rows": 16} if op == "linear_logp" else {}
                out = getattr(rf, op)(*leaves, x["targets"], entropy=entropy, **how, **more)
                outs = [out] if entropy == "none" else list(out)
                sum(part.sum() for part in outs if part.requires_grad).backward()
                say(f"{name} {op} softcap={softcap} entropy={entropy}", *outs, *(leaf.grad for leaf in leaves))
    for loss_type, options in LOSSES.items():
        config = rf.LossConfig(loss_type, temperature=0.8, **options)
        given = {key: x[key] for key in ("old_logp", "ref_logp", "sampling_logp", "mask")}
        given |= {"config": config, "step": 3, "seed": 5}
        for op, inputs in (("grpo_loss", ("logits",)), ("linear_grpo_loss", ("hidden", "weight"))):
            leaves = [x[key].clone().requires_grad_() for key in inputs]
            out = getattr(rf, op)(*leaves, x["targets"], x["advantages"], **given)
            (3 * out.loss).backward()
            grads = [leaf.grad for leaf in leaves]
            say(f"{name} {op} {loss_type}", out.loss, out.logp, out.entropy, out.route, *metrics_of(out), *grads)


def losses() -> None:
    x = rows(torch.float32)
    for loss_type, options in LOSSES.items():
        for packed in (False, True):
            logp = (x["ref_logp"] + 0.1).requires_grad_()
            shaped = {key: x[key] for key in ("old_logp", "ref_logp", "sampling_logp", "mask")}
            shaped |= {"entropy": -0.3 * x["ref_logp"]}
            if packed:
                shaped = {key: value.reshape(-1) for key, value in shaped.items()}
                shaped |= {"cu_seqlens": torch.arange(0, B * T + 1, T)}
            config = rf.LossConfig(loss_type, **options)
            source = logp.reshape(-1) if packed else logp
            out = rf.policy_loss(source, x["advantages"], **shaped, config=config, normalizer=11.0, step=3, seed=5)
            out.loss.backward()
            say(f"policy_loss {loss_type} packed={packed}", out.loss, logp.grad, *metrics_of(out))
    for peer in ("trl", "verl", "openrlhf", "liger"):
        say(f"LossConfig.like {peer}", rf.LossConfig.like(peer), sorted(rf.advantage_options(peer).items()))


def advantages(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randint(3, (48, 2), generator=generator).double()
    rewards[:8], rewards[9, 1], rewards[17] = 1.0, torch.nan, torch.inf
    ids = torch.randint(7, (48,), generator=generator) * 1000 - 5
    for label, options in ADVANTAGES.items():
        for groups in ({"group_size": 8}, {"group_ids": ids}):
            out = rf.group_advantages(rewards, **groups, **options)
            say(f"{name} group_advantages {label} {list(groups)[0]}", *out)


def model_of(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 37), torch.nn.Tanh(), torch.nn.Linear(37, 9)).to(dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 12, generator=generator).to(next(model.parameters()).dtype)

        def backward(x: Tensor = x) -> None:
            (model(x).float().square().mean() * 30).backward()

        backward()
        if optimizer.perturb():
            backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: torch.nn.Module, kind: str, options: dict) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    groups = [{"params": others, "perturb": True}, {"params": [first], "perturb": False}]
    if kind == "adamw":
        return rf.RegularizedAdamW(groups, lr=1e-2, weight_decay=0.1, seed=3, **options)
    return rf.GradientRegularizer(torch.optim.SGD(groups, lr=1e-2, momentum=0.9), seed=3, **options)


def without_times(values: dict[str, float]) -> list[tuple[str, str]]:
    kept = {name: repr(value) for name, value in values.items() if "time" not in name and "per_second" not in name}
    return sorted(kept.items())


def steps(name: str, keep: Path | None, kept: Path | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("adamw", "sgd"):
            for label, options in OPTIMIZERS.items():
                model = model_of(dtype)
                optimizer = optimizer_of(model, kind, options)
                train(model, optimizer, range(4))
                case = f"{str(dtype)[6:]}-{kind}-{label}"
                file = f"{name}-{case}.pt"
                say(f"{name} step {case}", *model.parameters(), *without_times(optimizer.metrics()))
                if keep is not None:
                    torch.save([model.state_dict(), optimizer.state_dict()], keep / file)
                if kept is not None:
                    weights, state = torch.load(kept / file, weights_only=True)
                    model = model_of(dtype)
                    model.load_state_dict(weights)
                    optimizer = optimizer_of(model, kind, options)
                    optimizer.load_state_dict(state)
                train(model, optimizer, range(4, 7))
                say(f"{name} step {case}, three more", *model.parameters())


def run_of(folder: Path) -> list[object]:
    """What a run left, without its times."""
    lines = [without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = sorted((folder / "checkpoints").iterdir())[-1] / "model.safetensors"
    return [lines, (folder / "completions.jsonl").read_text(), weights.read_bytes()]


def trainer(keep: Path | None, kept: Path | None) -> None:
    def redit_fast_train(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "redit_fast", "train", *words], check=True, stdout=subprocess.DEVNULL)

    small = ["--warm-start-steps", "40", "--eval-problems", "40", "--checkpoint-every", "5"]
    with tempfile.TemporaryDirectory() as folder:
        place = ["--out-dir", folder]
        redit_fast_train(*place, "--name", "whole", "--steps", "10", *small)
        say("demo, ten steps", *run_of(Path(folder, "whole")))
        if kept is not None:
            shutil.copytree(kept / "half", Path(folder, "half"))
        else:
            redit_fast_train(*place, "--name", "half", "--steps", "5", *small)
        if keep is not None:
            shutil.copytree(Path(folder, "half"), keep / "half")
        changed = ["--accept-changed-inputs"] * (kept is not None)  # a move changes the demo's own file
        redit_fast_train(*place, "--name", "half", "--steps", "10", "--resume", *changed)
        say("demo, resumed after five", *run_of(Path(folder, "half"))[1:])


def on_every_backend(body: Callable[[str], None]) -> None:
    for name in backends.NAMES:
        if all(backends.refusal(op, name, torch.device("cpu")) is None for op in backends.PRIMITIVES):
            with rf.use_backend(name):
                body(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, metavar="DIR", help="keep the states here")
    parser.add_argument("--load", type=Path, metavar="DIR", help="go on from the states kept here")
    parser.add_argument("--only", nargs="+", choices=("ops", "losses", "advantages", "steps", "trainer"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    wanted = args.only or ["ops", "losses", "advantages", "steps", "trainer"]
    if args.states is not None:
        args.states.mkdir(parents=True)
    if "advantages" in wanted:
        on_every_backend(advantages)
    if "losses" in wanted:
        losses()
    if "ops" in wanted:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            on_every_backend(lambda name, dtype=dtype: ops(dtype, f"{name} {str(dtype)[6:]}"))
    if "steps" in wanted:
        on_every_backend(lambda name: steps(name, args.states, args.load))
    if "trainer" in wanted:
        trainer(args.states, args.load)


if __name__ == "__main__":
    main()
