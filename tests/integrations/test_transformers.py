"""GR in transformers' own Trainer: what comes out is a hand-written loop with two backward passes."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.utils import AutocastKwargs
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import redit_fast as rf
from redit_fast.integrations.transformers import GRTrainerMixin
from tests.tolerance import relative

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")
GR = {"gr_gamma": 0.03, "gr_epsilon": 0.05}
LR = 0.05


class Recording(Trainer):
    """Keeps what every call of compute_loss saw and returned; poisons those in `poisoned`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rng = torch.get_rng_state()
        loss = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        if len(self.seen) in self.poisoned:
            loss = loss * math.nan
        self.seen.append(SimpleNamespace(inputs=dict(inputs), items=num_items_in_batch, rng=rng, loss=loss.detach()))
        return loss


class GRTrainer(GRTrainerMixin, Recording):
    pass


class Events(TrainerCallback):
    def __init__(self):
        self.names = []

    def on_pre_optimizer_step(self, *_, **__):
        self.names.append("pre")

    def on_optimizer_step(self, *_, **__):
        self.names.append("step")

    def on_step_end(self, *_, **__):
        self.names.append("end")


def a_model(kind="sft", dropout=0.2):
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
                         attention_dropout=dropout, num_labels=1, pad_token_id=0)  # fmt: skip
    return (Qwen2ForCausalLM if kind == "sft" else Qwen2ForSequenceClassification)(config)


def some_data(kind="sft", count=16):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(1, 33, (7,), generator=generator)
        labels = ids.masked_fill(torch.arange(7) < 1 + i % 4, -100) if kind == "sft" else torch.tensor(float(i % 3))
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def trained(folder, cls=GRTrainer, kind="sft", steps=3, poisoned=(), events=None, model=None, resume=None, **options):
    arguments = {"learning_rate": LR, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.5,
                 "per_device_train_batch_size": 2, "max_steps": steps, "logging_steps": 1, "save_strategy": "no",
                 "report_to": "none", "use_cpu": True, "disable_tqdm": True}  # fmt: skip
    gr = {name: value for name, value in options.items() if name.startswith("gr_")}
    arguments |= {name: value for name, value in options.items() if not name.startswith("gr_")}
    trainer = cls(
        model or a_model(kind),
        TrainingArguments(str(folder), **arguments),
        train_dataset=some_data(kind),
        callbacks=[] if events is None else [events],
        **gr,
    )
    trainer.seen, trainer.poisoned = [], set(poisoned)
    if kind == "reward":
        trainer.model_accepts_loss_kwargs = False  # a mean per micro-batch, as in TRL's RewardTrainer
    trainer.remove_callback(transformers.PrinterCallback)
    torch.manual_seed(5)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model, micro_batches, accumulation, max_norm, gamma, epsilon, divide):
    """Plain torch: per step the gradient at theta, the one at theta + epsilon g1 with the same dropout, SGD."""
    params, moved = list(model.parameters()), list(model.model.layers.parameters())
    norms = []
    model.train()

    def gradient(batches):
        model.zero_grad()
        for batch in batches:
            torch.set_rng_state(batch.rng)
            extra = {} if divide else {"num_items_in_batch": batch.items}
            (model(**batch.inputs, **extra).loss / (accumulation if divide else 1)).backward()
        return [p.grad.clone() for p in params]

    for start in range(0, len(micro_batches), accumulation):
        batches = micro_batches[start : start + accumulation]
        first = gradient(batches)
        direction = [p.grad.clone() for p in moved]
        length = torch.stack([g.norm() for g in direction]).norm()
        with torch.no_grad():
            theta = [p.clone() for p in moved]
            for p, g in zip(moved, direction):
                p += epsilon * min(1, 10 / length) * g
        second = gradient(batches)
        with torch.no_grad():
            for p, before in zip(moved, theta):
                p.copy_(before)
            for p, g1, g2 in zip(params, first, second):
                p.grad = (1 - gamma / epsilon) * g1 + gamma / epsilon * g2
            norms.append(torch.stack([p.grad.norm() for p in params]).norm().item())
            factor = min(1, max_norm / norms[-1]) if max_norm else 1
            for p in params:
                p -= LR * factor * p.grad
    return norms


def passes(trainer, accumulation):
    """The calls of the first passes, and of the second."""
    seen = trainer.seen
    starts = range(0, len(seen), 2 * accumulation)
    first = [call for start in starts for call in seen[start : start + accumulation]]
    second = [call for start in starts for call in seen[start + accumulation : start + 2 * accumulation]]
    return first, second


@pytest.mark.parametrize(
    ("kind", "accumulation", "max_norm"), [("sft", 2, 0.3), ("sft", 1, 0.0), ("reward", 2, 1.0), ("reward", 1, 1.0)]
)
def test_the_weights_losses_and_norms_are_those_of_a_hand_written_double_pass(tmp_path, kind, accumulation, max_norm):
    trainer = trained(
        tmp_path, kind=kind, gradient_accumulation_steps=accumulation, max_grad_norm=max_norm, **GR
    )  # fmt: skip
    first, second = passes(trainer, accumulation)
    model = a_model(kind)
    start = [p.clone() for p in model.parameters()]
    norms = by_hand(model, first, accumulation, max_norm, *GR.values(), divide=kind == "reward")
    for p, q, before in zip(trainer.model.parameters(), model.parameters(), start):
        assert not torch.equal(p, before) and relative(p - before, q - before) < 1e-4
    assert [entry["grad_norm"] for entry in logs(trainer)] == pytest.approx(norms, rel=1e-4)
    for one, two in zip(first, second):
        assert one.items == two.items and all(torch.equal(one.inputs[name], two.inputs[name]) for name in one.inputs)
        assert torch.equal(one.rng, two.rng) and one.loss != two.loss
    scale = accumulation if kind == "reward" else 1
    sums = [sum(call.loss for call in first[i : i + accumulation]).item() / scale
            for i in range(0, len(first), accumulation)]  # fmt: skip
    assert [entry["loss"] for entry in logs(trainer)] == pytest.approx(sums, rel=1e-5)


def test_gr_off_is_the_trainers_own_run_bit_for_bit_with_the_same_log_keys(tmp_path):
    stock, ours = trained(tmp_path, cls=Recording), trained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(stock.model.parameters(), ours.model.parameters()))
    assert [set(entry) for entry in logs(ours)] == [set(entry) for entry in logs(stock)]
    assert len(ours.seen) == len(stock.seen) == 3
    regularized = trained(tmp_path, **GR)
    for a, b in zip(stock.seen, passes(regularized, 1)[0]):  # the second pass does not move the random state
        assert torch.equal(a.rng, b.rng)
    new = set(logs(regularized)[0]) - set(logs(stock)[0])
    assert {"gr/g1_norm", "gr/step_cos", "gr/epsilon", "time/gr_pass2"} <= new
    assert all(name.startswith("gr/") or name == "time/gr_pass2" for name in new)


@pytest.mark.parametrize("options", [{"optim": "adamw_torch"}, {"gr_optimizer": "regularized_adamw"}])
@pytest.mark.parametrize("call", [2, 3])  # the first and the second pass of step 1
def test_a_step_that_is_not_finite_is_skipped_and_callbacks_still_fire(tmp_path, options, call):
    events, kept = Events(), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
            moments = [value.clone() for values in optimizer.state.values() for value in values.values()]
            kept.append([p.detach().clone() for p in model.parameters()] + moments)

    watch = Watch()
    events.on_step_end = lambda *a, **k: (watch.on_step_end(*a, **k), events.names.append("end"))[0]
    trainer = trained(tmp_path, poisoned=[call], events=events, **options, **GR)
    before, after, later = kept
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert not all(torch.equal(a, b) for a, b in zip(after, later))
    assert all(value.isfinite().all() for value in later)
    assert events.names == ["pre", "step", "end"] * 3
    assert [math.isfinite(entry["grad_norm"]) for entry in logs(trainer)] == [True, False, True]


def test_every_k_steps_regularises_the_multiples_of_k_alone(tmp_path):
    trainer = trained(tmp_path, steps=4, gr_every_k_steps=3, **GR)
    assert len(trainer.seen) == 4 + 2
    assert ["gr/g1_norm" in entry for entry in logs(trainer)] == [True, False, False, True]


def test_every_option_of_gr_reaches_the_second_pass(tmp_path):
    options = {"epsilon": 0.05, "normalized": True, "perturb_max_norm": 3.0, "rounding": "nearest",
               "keep_first_grad": True, "every_k_steps": 2}  # fmt: skip
    trainer = trained(tmp_path, steps=1, gr_gamma=0.03, **{f"gr_{name}": value for name, value in options.items()})
    assert trainer._gr.passes.gr == rf.GR(gamma=0.03, **options)
    assert "gr/penalty_ratio" in logs(trainer)[0]  # as the first gradient is kept


def test_an_exception_in_the_second_pass_leaves_the_weights_as_they_were(tmp_path):
    class Failing(GRTrainer):
        def compute_loss(self, *args, **kwargs):
            if len(self.seen) == 1:
                raise KeyError("pass 2")
            return super().compute_loss(*args, **kwargs)

    model = a_model()
    with pytest.raises(KeyError):
        trained(tmp_path, cls=Failing, model=model, **GR)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), a_model().parameters()))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Its gamma is 0 at step 0, 2/3 of the whole at step 2; one that began anew would have no second pass."""
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "gr_every_k_steps": 2,
               "gr_gamma_warmup_steps": 3, **GR}  # fmt: skip
    whole = trained(tmp_path / "whole", steps=4, **options)
    trained(tmp_path / "half", steps=2, **options)
    resumed = trained(tmp_path / "half", steps=4, resume=str(tmp_path / "half" / "checkpoint-2"), **options)
    assert len(resumed.seen) == 3 and len(whole.seen) == 5
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters()))


# 0.02 |theta| is then a step of less than 0.001 g1, where "auto" stops: what else multiplied g1 would show.
LARGE = 1000.0
AUTO = {"gr_gamma": 1e-3, "gr_epsilon": "auto", "gr_perturb_max_norm": 1e9}


class Large(GRTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return LARGE * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.filterwarnings("ignore:epsilon='auto' stops at")
@pytest.mark.parametrize("kind", ["sft", "reward"])  # a mean over the step's tokens, or one a micro-batch
def test_auto_epsilon_is_that_of_a_plain_loop_whatever_the_micro_batches(tmp_path, kind):
    expected = None
    for accumulation, size in ((1, 8), (4, 2)):
        trainer = trained(tmp_path, Large, kind, steps=1, gradient_accumulation_steps=accumulation,
                          per_device_train_batch_size=size, model=a_model(kind, dropout=0.0), **AUTO)  # fmt: skip
        if expected is None:
            (call, _), model = trainer.seen, a_model(kind, dropout=0.0)
            opt = rf.GradientRegularizer(torch.optim.SGD(rf.parameter_groups(model), lr=LR), gamma=1e-3,
                                         epsilon="auto", perturb_max_norm=1e9, max_norm=None)  # fmt: skip
            items = {} if kind == "reward" else {"num_items_in_batch": call.items}
            (LARGE * model(**call.inputs, **items).loss).backward()
            opt.perturb()
            expected = opt.epsilon
            assert 0 < expected < 9e-4
        assert logs(trainer)[0]["gr/epsilon"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:epsilon='auto' stops at")
def test_a_resumed_run_keeps_the_epsilon_that_was_found(tmp_path):
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, **AUTO}
    whole = trained(tmp_path / "whole", Large, steps=3, **options)
    trained(tmp_path / "half", Large, steps=2, **options)
    resumed = trained(tmp_path / "half", Large, steps=3, resume=str(tmp_path / "half" / "checkpoint-2"), **options)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters()))
    anew = trained(tmp_path / "anew", Large, steps=1, model=resumed.model, **AUTO)
    found = [logs(trainer)[-1]["gr/epsilon"] for trainer in (whole, resumed, anew)]
    assert found[0] == found[1] and found[2] != pytest.approx(found[0], rel=1e-2)


@pytest.mark.filterwarnings("ignore:epsilon='auto' stops at")
@pytest.mark.parametrize(("base", "gr"), [(GRTrainer, GR), (Large, AUTO)])
def test_a_grad_scaler_changes_nothing_and_what_overflows_is_skipped(tmp_path, base, gr):
    class Scaled(base):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.first_scale)
            self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)  # the scale alone, in float32

    Scaled.first_scale = 2.0**10
    plain, scaled = trained(tmp_path, cls=base, **gr), trained(tmp_path, cls=Scaled, **gr)
    for p, q in zip(plain.model.parameters(), scaled.model.parameters()):
        assert relative(q, p) < 1e-5
    for a, b in zip(logs(plain), logs(scaled)):
        assert [b[name] for name in ("grad_norm", "gr/g1_norm", "gr/epsilon")] == pytest.approx(
            [a[name] for name in ("grad_norm", "gr/g1_norm", "gr/epsilon")], rel=1e-5
        )
    Scaled.first_scale = 2.0**127
    model = a_model()
    overflowed = trained(tmp_path, cls=Scaled, model=model, steps=1, **gr)
    assert not math.isfinite(logs(overflowed)[0]["grad_norm"])
    assert overflowed.accelerator.scaler.get_scale() == 2.0**126
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), a_model().parameters()))


def test_regularized_adamw_is_the_trainers_adamw_and_keeps_float32_masters(tmp_path):
    options = {"weight_decay": 0.1, "adam_epsilon": 1e-4, "adam_beta1": 0.8}
    stock = trained(tmp_path, cls=Recording, optim="adamw_torch", **options)
    ours = trained(tmp_path, gr_optimizer="regularized_adamw", **options)
    for p, q in zip(stock.model.parameters(), ours.model.parameters()):
        assert relative(q, p) < 1e-5
    low = trained(tmp_path, model=a_model().bfloat16(), gr_optimizer="regularized_adamw", **GR)
    states = low.optimizer.optimizer.state.values()
    assert isinstance(low.optimizer.optimizer, rf.RegularizedAdamW)
    assert len(states) > 0 and all(state["master"].dtype == torch.float32 for state in states)


def test_arguments_and_versions_are_refused_by_name(tmp_path, monkeypatch):
    for options, message in [
        ({"gr_gamma": -1.0}, "gr_gamma must be finite and at least 0, got -1.0"),
        ({"gr_epsilon": 0.0}, "gr_epsilon must be finite and above 0, got 0.0"),
        ({"gr_epsilon": "Auto"}, "gr_epsilon must be a number above 0 or 'auto', got 'Auto'"),
        ({"gr_gamma": 1e-30, "gr_epsilon": "auto"}, r"gr_gamma must be 0 or within a factor of 2\*\*64 of epsilon"),
        ({"gr_perturb_max_norm": math.nan}, "gr_perturb_max_norm must be finite"),
        ({"gr_every_k_steps": 0}, "gr_every_k_steps must be at least 1, got 0"),
        ({"gr_optimizer": "adam"}, "gr_optimizer must be one of None, 'regularized_adamw'; got 'adam'"),
    ]:
        with pytest.raises(ValueError, match=message):
            GRTrainer(a_model(), TrainingArguments(str(tmp_path), use_cpu=True), **options)
    optimizer = torch.optim.SGD(a_model().parameters())
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match="gr_optimizer='regularized_adamw' and your own optimizer"),
    ):
        warnings.simplefilter("ignore")
        GRTrainer(a_model(), TrainingArguments(str(tmp_path), use_cpu=True), gr_optimizer="regularized_adamw",
                  optimizers=(optimizer, None))  # fmt: skip
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model, parameters: None)
    with pytest.raises(RuntimeError, match=rf"transformers got transformers {transformers.__version__}.*supported: 5"):
        GRTrainer(a_model(), TrainingArguments(str(tmp_path), use_cpu=True))
