"""A run on several ranks is the run on one: gradients, weights, metrics, samples; it goes on with any number."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training import processes, rank_steps
from tests.training.jobs import flags, lines_of

COMMON = {"steps": 3, "learning_rate": 1e-5, "eval_every": 3, "checkpoint_every": 3, "gr_gamma": 0.1, "gr_epsilon": 0.1}
CASES = {  # what a run has beside COMMON
    "gr": {"eval_problems": 5},
    # epsilon is 0.001 then: at a gamma of 0.1 g2 - g1, whose rounding is 1e-7, would count 100 times.
    "auto epsilon, several updates": {
        "gr_epsilon": "auto",
        "gr_gamma": 1e-3,
        "updates_per_rollout": 2,
        "gr_pass2_ratio": "pass1",
    },
    "kl, reset, sharpness": {"beta": 0.05, "gr_gamma": 0, "reference_reset_every": 2, "sharpness_every": 2},
    "lora": {"lora_rank": 2, "beta": 0.05},
    "one group": {"prompts_per_step": 1, "dither_dead_groups": "apply"},
    "all masked": {"prompts_per_step": 2, "overlong": "mask", "max_completion_length": 2},
    "padded": {"packing": "off", "micro_batch_size": 3, "eval_problems": 5, "eval_samples": 2},
    "small micro-batches": {"tokens_per_micro_batch": 120, "checkpoint_activations": True, "dynamic_sampling": 1},
}
NO_GRADIENT = "all masked"
ON_RANKS = [(2, "ddp"), (3, "fsdp2")]  # two under FSDP2 are in the tests of resumes, stops and counts


@pytest.fixture
def jobs(model_folder, problems):
    rewards = [f"redit_fast.training.builtin:{name}" for name in ("correct_answer", "right_steps")]
    base = {
        "model": str(model_folder), "data": str(problems), "rewards": rewards, "prompts_per_step": 5, "group_size": 4,
        "max_completion_length": 12, "eval_problems": 0, **COMMON,
    }  # fmt: skip
    return {name: base | more for name, more in CASES.items()}


def timeless(line):
    return {
        key: value
        for key, value in line.items()
        if value is not None  # NaN
        and not key.startswith(("time/", "step_time", "tokens/", "flops/"))  # what is computed differs with the ranks
    }


def test_two_and_three_ranks_are_one(jobs, tmp_path):
    """One test, so that the ranks start once and the runs of one process are made once."""
    processes.trained(jobs, str(tmp_path / "alone"))
    for size, strategy in ON_RANKS:
        out = tmp_path / strategy
        theirs = {name: job | {"strategy": strategy} for name, job in jobs.items()}
        codes, printed = processes.finish(processes.start(size, processes.trained, theirs, str(out), folder=out), out)
        assert codes == [0] * size, printed
        for name in jobs:
            assert_alike(name, tmp_path / "alone" / name, out / name)


def assert_alike(name, one, several):
    expected, found = (torch.load(run / "gradients.pt", weights_only=True) for run in (one, several))
    assert len(expected) == len(found) == 3 * CASES[name].get("updates_per_rollout", 1)
    assert expected[0].norm() > 1e-3 or name == NO_GRADIENT
    assert (found[0] - expected[0]).norm() <= 1e-6 * expected[0].norm()
    for gradient, other in zip(expected, found, strict=True):  # of weights that are 1e-7 apart
        assert (other - gradient).norm() <= 1e-4 * gradient.norm()
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    weights, others = (load_file(run / "checkpoints/step-000003" / file) for run in (one, several))
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(others[key], weight, rtol=1e-5, atol=1e-6)
    for line, other in zip(lines_of(one / "metrics.jsonl"), lines_of(several / "metrics.jsonl"), strict=True):
        assert timeless(other) == pytest.approx(timeless(line), rel=1e-3, abs=1e-5)
        if "reward" in line:
            assert name == NO_GRADIENT or other["tokens/rank_max_over_mean"] >= 1
            assert other["tokens/useful"] == line["tokens/useful"]
    samples, same = (lines_of(run / "completions.jsonl") for run in (one, several))
    for sample, other in zip(samples, same, strict=True):  # the same random numbers, and the same noise
        assert other == sample


@pytest.mark.parametrize("name, weights", [("gr", "model"), ("lora", "adapter_model")])
def test_a_run_goes_on_with_any_number_of_ranks(jobs, tmp_path, name, weights):
    """Two ranks, then one process, then three leave what one process does, the optimizer's state too."""
    processes.trained({name: jobs[name]}, str(tmp_path / "alone"))
    out = tmp_path / "resumed"
    words = flags(jobs[name] | {"out_dir": str(out), "name": name, "checkpoint_every": 1})
    for steps, size, strategy in ((1, 2, "fsdp2"), (2, 1, "ddp"), (3, 3, "fsdp2")):
        more = [*words, "--steps", str(steps), "--strategy", strategy, *(["--resume"] if steps > 1 else [])]
        if size == 1:
            assert processes.train(more) == 0
            continue
        codes, printed = processes.finish(processes.start(size, processes.train, more, folder=out), out)
        assert codes == [0] * size, printed
    for file in (f"{weights}.safetensors", "optimizer.safetensors"):
        straight = load_file(tmp_path / "alone" / name / "checkpoints/step-000003" / file)
        resumed = out / name / "checkpoints/step-000003"
        found = load_file(resumed / file) if (resumed / file).is_file() else whole(resumed)
        assert straight.keys() == found.keys()
        for key, value in straight.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert {path.name for path in resumed.iterdir()} >= {"optimizer.index.json", "optimizer-00003-of-00003.safetensors"}
    assert [line["step"] for line in lines_of(out / name / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_beside_its_shards_a_rank_holds_a_layer_or_the_head(tmp_path, size):
    """FSDP2's, at every operator of both passes: the head's weight, its gradient and a piece of it, or in place of the
    weight what gloo copies to reduce the gradient, and the layer that is gathered ahead."""
    for found in rank_steps.on_ranks(size, rank_steps.held, tmp_path):
        assert found["head"] > 2 * found["layer"]
        assert found["held"] < 3 * found["head"] + 1.2 * found["layer"]
        assert found["gradients"] <= 1e-6


def test_both_strategies_take_the_same_step(tmp_path):
    for strategy in ("fsdp2", "ddp"):
        rank_steps.counted(strategy, tmp_path)
    weights, others = (torch.load(tmp_path / f"{strategy}.pt", weights_only=True) for strategy in ("fsdp2", "ddp"))
    for key, weight in weights.items():
        torch.testing.assert_close(others[key], weight, rtol=1e-5, atol=1e-6)


def test_float32_adapters_in_a_bfloat16_model_have_the_gradients_of_one_process(tmp_path):
    """FSDP2 gathers both dtypes of a layer in one unit. The bfloat16 passes round by the rows of a micro-batch."""
    pytest.importorskip("peft", reason="peft is not installed: adapters need it")
    assert rank_steps.on_ranks(2, rank_steps.adapters, tmp_path) < 0.02


def whole(checkpoint):
    """The optimizer's tensors, of the shards."""
    table = json.loads((checkpoint / "optimizer.index.json").read_text())
    tensors = {}
    for name, described in table.items():
        tensors[name] = torch.full(described["shape"], float("nan"))
        for piece in described["pieces"]:
            there = tuple(slice(a, a + n) for a, n in zip(piece["start"], piece["shape"], strict=True))
            tensors[name][there] = load_file(checkpoint / piece["file"])[name]
    return tensors
