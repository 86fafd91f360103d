"""What the GR paper compares with in the trainer: a KL term, Reference Resets, presets. And the sharpness probe."""

import copy
import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import redit_fast as rf
from redit_fast.cli import main
from redit_fast.training import config_file, report, sharpness
from redit_fast.training.batch import Batch
from redit_fast.training.presets import PRESETS, Preset
from redit_fast.training.trainer import train
from tests.training.jobs import flags, lines_of
from tests.training.test_batch import MIXED, batch_of, gradient
from tests.training.test_stops import assert_equal_checkpoints, timeless


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Half a second a run."""
    monkeypatch.setattr(report, "write", lambda run: None)


@pytest.fixture
def resets(settings, tmp_path):
    """A job whose reference is reset after the second and the fourth step, and whose rewards differ in a group."""
    (tmp_path / "varied.py").write_text(
        "def judge(prompts, completions, **columns):\n    return [float(len(c) % 3) for c in completions]\n"
    )
    return {**settings, "rewards": [f"{tmp_path}/varied:judge"], "gr_gamma": 0.0, "beta": 0.3,
            "reference_reset_every": 2, "eval_problems": 0, "checkpoint_every": 100}  # fmt: skip


def weights(checkpoint, name="model.safetensors"):
    return load_file(checkpoint / name)


def test_the_reference_is_the_start_until_a_reset_makes_it_the_policy(resets, tmp_path, monkeypatch):
    """Step by step: what the loss is given as the reference's log-probs, and what the checkpoints hold of it."""
    given, score = [], Batch.score_reference

    def recorded(batch, reference):
        score(batch, reference)
        given.append((copy.deepcopy(reference.state_dict()), batch.ref_logp, reference.training))

    monkeypatch.setattr(Batch, "score_reference", recorded)
    train(config_file.load(overrides={**resets, "steps": 5, "checkpoint_every": 1, "keep_checkpoints": None}))
    folders = [tmp_path / f"run/checkpoints/step-{n:06d}" for n in range(6)]
    for step, ((reference, _, training), start) in enumerate(zip(given[1:], (0, 0, 2, 2, 4))):  # first the trial's
        policy_then = weights(folders[start])
        assert all(torch.equal(reference[name], policy_then[name]) for name in policy_then), step
        assert not training
    assert not torch.equal(given[1][0]["model.norm.weight"], given[3][0]["model.norm.weight"])
    has_reference = [(folder / "reference.safetensors").is_file() for folder in folders]
    assert has_reference == [False, False, True, True, True, True]
    held = weights(folders[3], "reference.safetensors")
    assert all(torch.equal(held[name], weights(folders[2])[name]) for name in held)
    kl = [line["kl"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert kl[1] > 3 * kl[2] and kl[3] > 3 * kl[4]  # a reset takes the distance away


def test_resets_resume_bit_by_bit_between_two_of_them_and_before_the_first(resets, tmp_path):
    job = {**resets, "checkpoint_every": 6, "reference_reset_every": 3}
    train(config_file.load(overrides={**job, "name": "straight", "steps": 7}))
    for done in (2, 5):  # from the start's reference, and from the reset's
        name = f"from-{done}"
        train(config_file.load(overrides={**job, "name": name, "steps": done}))
        assert main(["train", "--resume", *flags({**job, "name": name, "steps": 7})]) == 0
        for step in (6, 7):
            ours, theirs = (tmp_path / run / f"checkpoints/step-{step:06d}" for run in ("straight", name))
            assert_equal_checkpoints(ours, theirs)
            a, b = (weights(folder, "reference.safetensors") for folder in (ours, theirs))
            assert all(torch.equal(a[key], b[key]) for key in a)
        assert timeless(tmp_path / "straight" / "metrics.jsonl") == timeless(tmp_path / name / "metrics.jsonl")


def test_a_damaged_start_is_named_where_the_reference_comes_from_it(resets, tmp_path, capsys):
    train(config_file.load(overrides={**resets, "steps": 1}))
    shutil.rmtree(tmp_path / "run/checkpoints/step-000000")
    assert main(["train", "--resume", *flags({**resets, "steps": 3})]) == 2
    errors = capsys.readouterr().err
    assert "step-000000, the reference of the KL term, is damaged" in errors and len(errors.splitlines()) == 1


def test_the_kl_term_is_in_the_loss_and_holds_the_policy_near_its_start(resets, tmp_path):
    """A heavier term, a shorter way, with the gradient of beta k3 in both passes."""
    ends = []
    for beta in (0.05, 5.0):
        job = {**resets, "name": f"beta-{beta}", "beta": beta, "reference_reset_every": 0, "steps": 6}
        train(config_file.load(overrides=job))
        ends.append(lines_of(tmp_path / job["name"] / "metrics.jsonl")[-1]["kl"])
    assert ends[0] > 2 * ends[1] > 0


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_the_reference_is_scored_as_the_loss_scores_the_policy(model_folder, loss_type):
    """At the start d = 0 exactly: no KL, and no gradient of it. Away from it both passes see the same reference."""
    settings = rf.LossConfig(loss_type, beta=0.7)
    model, batch = batch_of(model_folder, MIXED, settings, micro_batch_size=3)
    reference = copy.deepcopy(model)
    batch.score_reference(reference)
    assert torch.equal(batch.ref_logp, batch.backward(model).logp)
    without_kl = gradient(model)
    model.zero_grad()
    batch.settings = rf.LossConfig(loss_type)
    batch.backward(model)
    torch.testing.assert_close(without_kl, gradient(model), rtol=1e-4, atol=1e-7)

    batch.settings = settings
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    first = batch.backward(model)
    d = batch.ref_logp - first.logp
    kl = (torch.expm1(d) - d).mean().item()
    assert first.metrics["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0


def test_kl_and_gr_together_warn_and_one_of_them_is_silent(resets, recwarn):
    both = {**resets, "gr_gamma": 1e-3, "steps": 1, "reference_reset_every": 0}
    with pytest.warns(UserWarning, match="beta is 0.3 and gr_gamma 0.001: a KL term and gradient regularisation"):
        train(config_file.load(overrides=both))
    recwarn.clear()
    for name, change in (("kl", {"gr_gamma": 0.0}), ("gr", {"beta": 0.0})):
        train(config_file.load(overrides={**both, "name": name, **change}))
    assert not [str(warning.message) for warning in recwarn if "both on" in str(warning.message)]


def test_presets_are_the_papers_settings_and_what_is_set_beside_them_wins():
    own = {"model": "m", "data": "d", "rewards": ["exact_answer"]}
    loaded = {name: config_file.load(overrides={**own, "preset": name}) for name in PRESETS}
    assert tuple(PRESETS) == Preset.__args__
    assert {name: c.learning_rate for name, c in loaded.items()} == {
        "grpo": 3e-6, "kl": 3e-6, "resets": 3e-6, "gr": 5e-6
    }  # fmt: skip
    assert [name for name, c in loaded.items() if c.gr_gamma] == ["gr"]
    assert loaded["gr"].gr_gamma == loaded["gr"].gr_epsilon
    assert [name for name, c in loaded.items() if c.beta] == ["kl", "resets"]
    assert [name for name, c in loaded.items() if c.reference_reset_every] == ["resets"]
    mixed = config_file.load(overrides={**own, "preset": "kl", "learning_rate": 1e-6, "gr_gamma": 1e-3})
    assert (mixed.learning_rate, mixed.gr_gamma, mixed.beta) == (1e-6, 1e-3, 0.05)
    command = mixed.command()
    assert "--preset kl" in command and "--gr-gamma 0.001" in command and "--beta" not in command


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"reference_reset_every": 5}, "reference_reset_every: got 5 without a KL term, needs a beta above 0"),
        ({"beta": -0.1}, "beta: got -0.1, needs a number greater than or equal to 0"),
        ({"preset": "dpo"}, "preset: got 'dpo', needs 'grpo', 'kl', 'resets' or 'gr'"),
        ({"preset": ["kl"]}, "preset: got ['kl'], needs"),
        ({"adam_beta2": 1.0}, "adam_beta2: got 1.0, needs a number less than 1"),
        ({"sharpness_every": -1}, "sharpness_every: got -1, needs a number greater than or equal to 0"),
    ],
)
def test_a_wrong_setting_of_a_baseline_is_named(settings, sentence):
    with pytest.raises(ValueError) as error:
        config_file.load(overrides=settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_reset_reference_copies_bit_by_bit_in_place_and_refuses_another_model():
    policy_model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    policy_model[1].running_mean.fill_(0.3)
    reference = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).requires_grad_(False)
    held = list(reference.parameters())
    rf.reset_reference(reference, policy_model)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, policy_model.state_dict()[name])
    assert all(a is b and not b.requires_grad for a, b in zip(held, reference.parameters()))
    low = copy.deepcopy(reference).to(torch.bfloat16)
    rf.reset_reference(low, policy_model)
    assert torch.equal(low[0].weight, policy_model[0].weight.to(torch.bfloat16))

    before = copy.deepcopy(reference.state_dict())
    for other, words in (
        (torch.nn.Sequential(torch.nn.Linear(3, 4)), "1.bias"),
        (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(5)), r"1.weight.*\(4,\).*\(5,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            rf.reset_reference(reference, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())


def test_the_sharpness_probe_is_the_hessian_times_the_gradient(model_folder, monkeypatch):
    """Against the difference of gradients on both sides, and in the first order the loss against |g|."""
    monkeypatch.setattr(sharpness, "RADIUS", 1e-3)
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig())
    optimizer = rf.RegularizedAdamW(rf.parameter_groups(model), gamma=0.0)
    moved, others = (group["params"] for group in optimizer.param_groups)
    first = batch.backward(model)
    before = {p: (p.detach().clone(), p.grad.clone()) for p in [*moved, *others]}
    found = sharpness.probe(model, batch, first, optimizer, 2)
    for p, (value, grad) in before.items():
        assert torch.equal(p, value) and torch.equal(p.grad, grad)

    norm = torch.cat([before[p][1].flatten() for p in moved]).norm()
    radius = 1e-3 * torch.cat([p.detach().flatten() for p in moved]).norm()
    gradients, losses = [], []
    for side in (1, -1):
        model.zero_grad()
        with torch.no_grad():
            for p in moved:
                p.copy_(before[p][0] + side * radius * before[p][1] / norm)
        losses.append(batch.backward(model, first.logp).loss)
        gradients.append(torch.cat([p.grad.flatten() for p in moved]))
    curvature = ((gradients[0] - gradients[1]).norm() / (2 * radius)).item()
    assert found["sharpness/curvature"] == pytest.approx(curvature, rel=0.05) and curvature > 0
    assert found["sharpness/loss_rise"] == pytest.approx((losses[0] - losses[1]) / 2, rel=0.05)
    assert found["sharpness/loss_rise"] == pytest.approx((radius * norm).item(), rel=0.05)


def test_the_probe_leaves_the_kl_term_out_and_the_gradients_as_they_were(model_folder):
    """Its curvature is that of a batch without one, though the gradient that it finds there has one."""
    reference, _ = batch_of(model_folder, MIXED, rf.LossConfig())
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn_like(p))
    found = []
    for settings in (rf.LossConfig(), rf.LossConfig(beta=3.0)):
        model, batch = batch_of(model_folder, MIXED, settings)
        if settings.beta:
            batch.score_reference(reference)
        optimizer = rf.RegularizedAdamW(rf.parameter_groups(model), gamma=0.0)
        first = batch.backward(model)
        before = gradient(model).clone()
        found.append((sharpness.probe(model, batch, first, optimizer, 2), before))
        assert torch.equal(gradient(model), before)
    (without, g1), (with_kl, g2) = found
    assert without == with_kl and (g1 - g2).norm() > 0.1 * g1.norm()


def test_the_signal_is_the_inner_product_of_both_halves_gradients_at_advantages_of_size_one(model_folder):
    """Not of the sums: of both halves' means over tokens, and no larger for larger advantages."""
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig(), micro_batch_size=3)
    halves = []
    for others in (range(4, 8), range(4)):
        model.zero_grad()
        dataclasses.replace(batch, masked=frozenset(others)).backward(model)
        halves.append(gradient(model).double())
    expected = (halves[0] @ halves[1]).item() / torch.tensor(MIXED).square().mean().item()
    params = [p for p in model.parameters() if p.requires_grad]
    assert sharpness.signal(model, batch, params, 2) == pytest.approx(expected, rel=1e-3)
    larger = dataclasses.replace(batch, advantages=3 * batch.advantages)
    assert sharpness.signal(model, larger, params, 2) == pytest.approx(expected, rel=1e-3)
    for size, advantages in ((8, batch.advantages), (2, torch.zeros(8))):
        nothing = sharpness.signal(model, dataclasses.replace(batch, advantages=advantages), params, size)
        assert math.isnan(nothing)


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_a_parameter_that_some_samples_do_not_reach_has_a_gradient_of_0_there(model_folder, monkeypatch, beta):
    """As an expert of a mixture: one that neither half reaches, and one that only the last pass does."""
    model, batch = batch_of(model_folder, [1.0, -1.0, 0.5, 2.0, 0.0, 0.0, -0.3, 0.4], rf.LossConfig(beta=beta))
    if beta:
        batch.score_reference(model)
    experts = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]
    for number, expert in enumerate(experts):
        model.register_parameter(f"expert{number}", expert)
    optimizer, hidden, moved = rf.RegularizedAdamW(rf.parameter_groups(model), gamma=0.0), Batch.hidden, []

    def routed(batch, model, micro):
        found, *others = hidden(batch, model, micro)
        reached = [experts[0]] * (not moved and len(batch.prompts) != 4) + [experts[1]] * bool(moved)
        return sum(reached, found), *others

    perturb = sharpness.TwoPass.perturb
    monkeypatch.setattr(Batch, "hidden", routed)
    monkeypatch.setattr(sharpness.TwoPass, "perturb", lambda passes: (moved.append(True), perturb(passes)))
    first = batch.backward(model)
    before = {p: None if p.grad is None else p.grad.clone() for p in model.parameters()}
    found = sharpness.probe(model, batch, first, optimizer, 2)
    assert all(map(math.isfinite, found.values()))
    for p, grad in before.items():
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)


def test_a_signal_has_no_sampling_noise_in_the_mean_where_the_squared_norm_has(model_folder):
    """Advantages are coins: the true gradient is 0."""
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig())
    params = [p for p in model.parameters() if p.requires_grad]
    generator, products, squares = torch.Generator().manual_seed(0), [], []
    for _ in range(24):
        coins = torch.randint(0, 2, (8,), generator=generator) * 2.0 - 1
        drawn = dataclasses.replace(batch, advantages=coins)
        products.append(sharpness.signal(model, drawn, params, 2))
        model.zero_grad()
        drawn.backward(model)
        squares.append(gradient(model).square().sum().item())
    mean, noise = sum(products) / 24, sum(squares) / 24
    assert abs(mean) < 0.5 * noise and min(products) < 0 < max(products)


def test_a_probed_run_is_the_same_run(resets, tmp_path):
    job = {**resets, "beta": 0.0, "reference_reset_every": 0, "gr_gamma": 0.1, "steps": 4}
    for name, every in (("plain", 0), ("probed", 2)):
        train(config_file.load(overrides={**job, "name": name, "sharpness_every": every}))
    assert_equal_checkpoints(*(Path(tmp_path, name, "checkpoints/step-000004") for name in ("plain", "probed")))
    plain, probed = (timeless(tmp_path / name / "metrics.jsonl") for name in ("plain", "probed"))
    assert ["sharpness/curvature" in line for line in probed] == [False, False, True, False, True]
    for line in (probed[2], probed[4]):
        assert line.pop("sharpness/curvature") > 0 and line.pop("sharpness/loss_rise") > 0
        assert line.pop("sharpness/signal") != 0
    assert plain == probed


def test_a_run_with_epsilon_auto_resumes_bit_by_bit(resets, tmp_path):
    job = {**resets, "beta": 0.0, "reference_reset_every": 0, "gr_gamma": 1e-3, "gr_epsilon": "auto", "steps": 4}
    train(config_file.load(overrides={**job, "name": "straight"}))
    train(config_file.load(overrides={**job, "name": "halves", "steps": 2}))
    assert main(["train", "--resume", *flags({**job, "name": "halves"})]) == 0
    assert_equal_checkpoints(*(tmp_path / n / "checkpoints/step-000004" for n in ("straight", "halves")))
    assert timeless(tmp_path / "straight" / "metrics.jsonl") == timeless(tmp_path / "halves" / "metrics.jsonl")
