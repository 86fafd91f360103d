"""TRL's real trainers on the CPU, stock beside ours: with dithering and GR off nothing differs."""

import dataclasses
import importlib
import inspect
import json
import math
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: its integration needs it")
pytest.register_assert_rewrite("tests.integrations.trl_trainers")  # imported below, and a plugin: its fixtures

import trl  # noqa: E402
import trl.trainer.utils as utils  # noqa: E402
from transformers import HfArgumentParser, Qwen2ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, TrlParser  # noqa: E402

from redit_fast import integrations  # noqa: E402
from redit_fast.integrations import trl_function  # noqa: E402
from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer, ReditOptions, patch  # noqa: E402
from redit_fast.integrations.trl import head as trl_head  # noqa: E402
from tests.integrations.trl_trainers import clipped_inputs, logged, logs  # noqa: E402
from tests.tolerance import relative  # noqa: E402

pytest_plugins = ("tests.integrations.trl_trainers",)
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing")
SAME = [
    ({"loss_type": "grpo"}, "qwen2"),
    ({"loss_type": "bnpo", "gradient_accumulation_steps": 2}, "qwen2"),
    ({"loss_type": "dr_grpo", "num_iterations": 2, "epsilon": 0.01, "epsilon_high": 0.02}, "qwen2"),
    ({"loss_type": "dapo", "beta": 0.1, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, "qwen2"),
    ({"loss_type": "cispo", "gradient_checkpointing": True}, "qwen2"),
    ({"loss_type": "luspo", "delta": 1.001, "num_iterations": 2}, "qwen2"),
    ({"loss_type": "sapo", "entropy_coef": 0.05}, "qwen2"),
    ({"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 2, "beta": 0.1}, "qwen2"),
    ({"loss_type": "vespo", "gradient_accumulation_steps": 2, "steps_per_generation": 4}, "qwen2"),
    (
        {"top_entropy_quantile": 0.4, "use_adaptive_entropy": True, "temperature": 0.8},
        "qwen2",
    ),  # 0.5 cuts between equals
    ({"beta": 0.1}, "gemma2"),
    ({"num_iterations": 2, "scale_rewards": "batch"}, "cohere"),
]
TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


@pytest.mark.parametrize(("options", "kind"), SAME, ids=[f"{o.get('loss_type', 'dapo')}-{k}" for o, k in SAME])
def test_with_dithering_and_gr_off_everything_is_trls(a_trainer, options, kind):
    stock = a_trainer(GRPOTrainer, GRPOConfig, kind, steps=10, **options)
    start = [p.detach().clone() for p in stock.model.parameters()]
    stock.train()
    ours = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, kind, steps=10, **options)
    ours.train()
    for p, q, before in zip(ours.model.parameters(), stock.model.parameters(), start):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)
        if (q - before).norm() > 1e-3:
            assert relative(p.detach() - before, q.detach() - before) < 1e-3
    assert len(logs(ours)) == 10
    for mine, theirs in zip(logs(ours), logs(stock)):
        assert set(mine) == set(theirs)
        for name in set(mine) - TIMES:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5, nan_ok=True), name
    assert max(abs(entry["grad_norm"]) for entry in logs(ours)) > 1e-2
    assert math.isfinite(logs(ours)[-1]["loss"])


def test_off_and_without_our_head_the_run_is_trls_bit_for_bit(a_trainer):
    stock = a_trainer(GRPOTrainer, GRPOConfig)
    stock.train()
    ours = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, fused_head=False)
    ours.train()
    assert all(torch.equal(p, q) for p, q in zip(ours.model.parameters(), stock.model.parameters()))


def touched(trainer):
    """Every attribute that patch() could touch, by identity."""
    models = [trainer.model, trainer.ref_model]
    return [type(trainer), set(vars(trainer)), trainer.optimizer_cls_and_kwargs, getattr(utils, trl_head.NAME),
            *(vars(model)["forward"] for model in models), *(type(model).forward for model in models)]  # fmt: skip


def test_patch_on_a_trainer_is_the_subclass_and_leaves_every_attribute_as_it_was(a_trainer, monkeypatch):
    fields = {"dither_level": 0.1, "gr_gamma": 0.02, "gr_epsilon": 0.02, "gr_optimizer": "regularized_adamw"}
    ours = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, beta=0.1, steps=2, **fields)
    ours.train()
    patched = a_trainer(GRPOTrainer, GRPOConfig, beta=0.1, steps=2)
    before = touched(patched)
    with patch(patched, **fields):
        assert type(patched).__name__ == "GRPOTrainer" and isinstance(patched, GRPOTrainer)
        assert vars(patched.model)["forward"] is not before[4] and vars(patched.ref_model)["forward"] is not before[5]
        with pytest.raises(RuntimeError, match="this GRPOTrainer has redit-fast already"), patch(patched):
            pass
    assert all(a is b or a == b for a, b in zip(touched(patched), before))
    with pytest.raises(KeyError), patch(patched):
        raise KeyError
    assert all(a is b or a == b for a, b in zip(touched(patched), before))
    with patch(patched, **fields):
        patched.train()
    assert all(torch.equal(p, q) for p, q in zip(ours.model.parameters(), patched.model.parameters()))
    assert [set(entry) for entry in logs(patched)] == [set(entry) for entry in logs(ours)]
    assert vars(patched.model)["forward"] is before[4] and type(patched) is GRPOTrainer


def count_calls(monkeypatch):
    """What our two heads are called for: an entropy mode, or a loss type."""
    calls, linear_logp, linear_grpo_loss = [], trl_function.linear_logp, trl_head.linear_grpo_loss

    def logp(*args, **options):
        calls.append(options["entropy"])
        return linear_logp(*args, **options)

    def loss(*args, **options):
        calls.append(options["config"].loss_type)
        return linear_grpo_loss(*args, **options)

    monkeypatch.setattr(trl_function, "linear_logp", logp)
    monkeypatch.setattr(trl_head, "linear_grpo_loss", loss)
    return calls


def test_the_head_is_ours_in_the_trainers_models_alone_and_three_products_where_they_are_enough(a_trainer, monkeypatch):
    calls, theirs = count_calls(monkeypatch), getattr(utils, trl_head.NAME)
    for options, expected in [
        ({"beta": 0.1}, ["none", "dapo"]),  # the reference's log-probs, the policy's loss
        ({"loss_type": "cispo", "num_iterations": 2}, ["metric", "cispo"]),  # the old log-probs
        ({"entropy_coef": 0.1}, ["grad"]),
        ({"importance_sampling_level": "sequence"}, ["metric"]),
    ]:
        a_trainer(ReditGRPOTrainer, ReditGRPOConfig, steps=1, **options).train()
        assert calls == expected and getattr(utils, trl_head.NAME) is theirs
        calls.clear()
    a_trainer(GRPOTrainer, GRPOConfig, steps=1).train()
    assert calls == []


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_rows_that_trl_compacts_give_the_same(a_trainer, monkeypatch, loss_type):
    """On a GPU TRL passes the scored rows alone to its head, on the CPU every one."""
    expected = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, loss_type=loss_type, num_iterations=2)
    expected.train()
    monkeypatch.setattr(utils, "_use_triton", lambda device: True, raising=False)  # TRL 1.15 always does
    compact = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, loss_type=loss_type, num_iterations=2)
    compact.train()
    for p, q in zip(compact.model.parameters(), expected.model.parameters()):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("options", [{"loss_type": "dapo", "beta": 0.1}, {"loss_type": "grpo"}, {"loss_type": "cispo"}])
def test_what_is_logged_leaves_out_what_scored_nothing_as_trl_does(a_trainer, monkeypatch, options, compact):
    """A micro-batch, or a sequence, without scored tokens: TRL's extremes leave it out, its means count tokens."""
    trainer = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, steps=1, **options)
    trainer.train()
    monkeypatch.setattr(utils, "_use_triton", lambda device: compact, raising=False)
    for masks in ([[1, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 0, 0], [1, 1, 0]]):
        inputs = clipped_inputs(3, masks, trainer.beta)
        theirs, ours = (logged(trainer, cls, inputs) for cls in (GRPOTrainer, ReditGRPOTrainer))
        assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)
        if options["loss_type"] != "cispo":
            least = ours["clip_ratio/low_min"]
            assert math.isnan(least) if sum(map(sum, masks)) == 0 else least == 1


def test_patch_on_trls_module_serves_every_trainer_inside_the_block(folders, monkeypatch):
    calls, theirs = count_calls(monkeypatch), getattr(utils, trl_head.NAME)
    ids = torch.randint(5, 60, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)

    def run(outputs):
        model = Qwen2ForCausalLM.from_pretrained(folders["qwen2"])
        utils.add_fused_lm_head(model, temperature=0.7, outputs=outputs)
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss - 0.1 * out.entropy.sum()).backward()
        return out, [p.grad for p in model.parameters()]

    for further, expected in (((), ["grad"]), (("is_top1",), ["grad"]), (("mean_logits",), [])):
        outputs = ("log_probs", "entropy", *further)
        calls.clear()
        own, gradients = run(outputs)
        assert calls == []
        with patch(utils):
            ours, found = run(outputs)
        assert calls == expected and getattr(utils, trl_head.NAME) is theirs
        assert torch.allclose(ours.log_probs, own.log_probs, atol=1e-5) and own.log_probs.abs().max() > 1
        assert torch.allclose(ours.entropy, own.entropy, atol=1e-5)
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, gradients))
        assert [name for name in ("is_top1", "mean_logits") if getattr(ours, name) is not None] == list(further)
        assert all(torch.equal(getattr(ours, name), getattr(own, name)) for name in further)
    with pytest.raises(TypeError, match="patch.trl.trainer.utils. takes no options, got dither_level"):
        with patch(utils, dither_level=0.1):
            pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dither_level": -0.1}, "dither_level must be finite and at least 0, got -0.1"),
        ({"dither_distribution": "cauchy"}, "dither_distribution must be one of 'gaussian', 'uniform'; got 'cauchy'"),
        ({"dither_schedule": "cosine_reverse"}, "dither_schedule='cosine_reverse' counts back .* needs total_steps"),
        ({"dither_dead_groups": "drop"}, "dither_dead_groups must be one of 'apply', "),
        ({"dither_reward_scale": math.nan}, "dither_reward_scale must be a finite number"),
        ({"dither_reward_scale": []}, "dither_reward_scale must be .* one finite number per reward, got none"),
        ({"dither_seed": -1}, "dither_seed must be in"),
        ({"gr_gamma": math.inf}, "gr_gamma must be finite and at least 0, got inf"),
        ({"gr_epsilon": 0.0}, "gr_epsilon must be finite and above 0, got 0.0"),
        ({"gr_epsilon": "Auto"}, "gr_epsilon must be a number above 0 or 'auto', got 'Auto'"),
        ({"gr_gamma": 1e-30, "gr_epsilon": "auto"}, "gr_gamma must be 0 or within a factor of"),
        ({"gr_pass2_ratio": "old"}, "gr_pass2_ratio must be one of 'fresh', 'pass1'; got 'old'"),
        ({"gr_every_k_steps": 0}, "gr_every_k_steps must be at least 1, got 0"),
        ({"gr_optimizer": "adamw"}, "gr_optimizer must be one of None, 'regularized_adamw'; got 'adamw'"),
    ],
)
def test_a_field_out_of_range_is_refused_naming_it(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        ReditGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **fields)


@pytest.mark.parametrize("value", ["no", "", 1, 0, None, [True]])
def test_a_flag_is_a_bool(tmp_path, value):
    flags = [field.name for field in dataclasses.fields(ReditOptions) if isinstance(field.default, bool)]
    assert {"fused_head", "gr_normalized"} <= set(flags)
    for name in flags:
        with pytest.raises(TypeError, match=f"^{name} must be a bool, got "):
            ReditOptions(**{name: value})
        with pytest.raises(TypeError, match=f"^{name} must be a bool, got "):
            ReditGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{name: value})


def test_what_does_not_fit_the_trainer_is_refused_naming_it(a_trainer, monkeypatch):
    with pytest.raises(TypeError, match="args must be a ReditGRPOConfig, got GRPOConfig"):
        a_trainer(ReditGRPOTrainer, GRPOConfig)
    with pytest.raises(ValueError, match="dither_reward_scale has 2 entries; rewards have 1 columns"):
        a_trainer(ReditGRPOTrainer, ReditGRPOConfig, dither_level=0.1, dither_reward_scale=[1.0, 2.0])
    stock = a_trainer(GRPOTrainer, GRPOConfig)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dither'"), patch(stock, dither=0.1):
        pass
    with pytest.raises(TypeError, match="a GRPOTrainer, an RLOOTrainer or trl.trainer.utils, got int"), patch(3):
        pass


def test_unsloths_head_and_loss_stay_beside_dithering_and_gr(a_trainer, monkeypatch):
    """As its 2026.10.9 leaves TRL: a head with apply() alone, methods that pass everything on."""
    theirs, calls = getattr(utils, trl_head.NAME), count_calls(monkeypatch)
    score = GRPOTrainer._generate_and_score_completions
    monkeypatch.setitem(sys.modules, "unsloth", trl)
    monkeypatch.setattr(utils, trl_head.NAME, type("Dispatch", (), {"apply": staticmethod(theirs.apply)}))
    monkeypatch.setattr(
        GRPOTrainer, "_generate_and_score_completions", lambda self, *args, **kwargs: score(self, *args, **kwargs)
    )
    with pytest.warns(UserWarning, match="unsloth .*: dithering and GR work with them, fused_head stays off"):
        trainer = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, steps=1, dither_level=0.1, gr_gamma=1e-3)
    trainer.train()
    assert {"dither/reward_std", "gr/g1_norm"} <= set(logs(trainer)[0]) and calls == []
    with pytest.raises(RuntimeError, match="unsloth has put its own head"), patch(utils):
        pass


def test_a_version_with_other_methods_is_refused_naming_the_supported_ones(a_trainer, monkeypatch):
    stock = a_trainer(GRPOTrainer, GRPOConfig)
    supported = rf"redit_fast.integrations.trl got trl {trl.__version__}.*; supported: TRL 1.15..1.16"
    with monkeypatch.context() as m:
        m.setattr(GRPOTrainer, "_calculate_rewards", lambda self, inputs: None)
        with pytest.raises(RuntimeError, match=supported), patch(stock):
            pass
        with pytest.raises(RuntimeError, match=supported):
            ReditGRPOTrainer(None)
    monkeypatch.delattr(utils, trl_head.NAME)
    for target in (stock, utils):
        with pytest.raises(RuntimeError, match=supported), patch(target):
            pass


def test_an_older_version_is_refused_before_what_it_lacks_is_imported_and_a_newer_one_warns_once(monkeypatch):
    name = "redit_fast.integrations.trl"
    monkeypatch.setattr(integrations, "trl", integrations.trl)  # puts back what the imports below replace

    def imported(version):
        monkeypatch.setattr(trl, "__version__", version)
        monkeypatch.delitem(sys.modules, name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            importlib.import_module(name)
        return [str(w.message) for w in caught]

    assert imported(trl.__version__) == imported("1.15.0.dev0") == []
    newer = f"{name} got trl 1.99.0, which is newer than what it was tested with; supported: TRL 1.15..1.16"
    assert imported("1.99.0") == [newer] and imported("1.99.0") == []
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)  # as much as 0.24 gives under today's transformers
    older = f"{name} got trl 0.24.0, which is older than it supports; supported: TRL 1.15..1.16"
    with pytest.raises(RuntimeError, match=f"^{older}$"):
        imported("0.24.0")


def test_the_version_of_transformers_is_judged_too(a_trainer, monkeypatch):
    stock, transformers = a_trainer(GRPOTrainer, GRPOConfig), integrations.trl.transformers
    monkeypatch.setattr(transformers, "__version__", "5.5.9")
    with pytest.raises(RuntimeError, match="integrations.trl got transformers 5.5.9, which is older"), patch(stock):
        pass
    monkeypatch.setattr(transformers, "__version__", "5.999.0")
    with pytest.warns(UserWarning, match="integrations.trl got transformers 5.999.0, which is newer"), patch(stock):
        pass


def test_the_config_is_a_command_line_and_keeps_trls_defaults(tmp_path):
    (config,) = HfArgumentParser(ReditGRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--dither_level", "0.05", "--dither_schedule", "cosine", "--gr_gamma", "1e-3",
         "--gr_optimizer", "regularized_adamw", "--fused_head", "False", "--use_cpu", "True", "--bf16", "False",
         "--gr_epsilon", "auto"]
    )  # fmt: skip
    assert (config.dither_level, config.dither_schedule, config.gr_gamma) == (0.05, "cosine", 1e-3)
    assert config.gr_epsilon == config.gr().epsilon == "auto"
    assert (config.gr_optimizer, config.fused_head) == ("regularized_adamw", False)
    stock = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    ours = ReditGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    own = set(inspect.signature(GRPOConfig).parameters) - {"logging_dir"}
    assert all(getattr(ours, name) == getattr(stock, name) for name in own if hasattr(stock, name))


def test_every_field_of_ours_has_a_help_text():
    theirs = {f.name for f in dataclasses.fields(GRPOConfig)}
    ours = [f for f in dataclasses.fields(ReditGRPOConfig) if f.name not in theirs]
    assert {f.name for f in ours} == {f.name for f in dataclasses.fields(ReditOptions)}
    texts = [f.metadata.get("help", "") for f in ours]
    assert all(len(text) > 20 and text.endswith(".") for text in texts) and len(set(texts)) == len(texts) == 19
    shown = TrlParser(ReditGRPOConfig).format_help()  # formats with %
    assert all("".join(text.split()) in "".join(shown.split()) for text in texts)


@pytest.mark.parametrize("where", ["command line", "yaml"])
@pytest.mark.parametrize("scale", [[1.0, 2.0], [0.5], None])
def test_a_scale_for_each_reward_parses_as_trls_lists_do(tmp_path, scale, where):
    """One number is every reward's, also as one entry and by default."""
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "dither_level": "1e-2",
               "gr_epsilon": "1e-4", "dither_seed": 7, "gr_normalized": True, "fused_head": False}  # fmt: skip
    options |= {"gr_epsilon": "auto"} if scale is None else {"dither_reward_scale": scale}
    if where == "yaml":
        (tmp_path / "config.yaml").write_text(json.dumps(options))
        args = ["--config", str(tmp_path / "config.yaml")]
    else:
        args = [word for name, value in options.items() for word in
                (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]  # fmt: skip
    (config,) = TrlParser(ReditGRPOConfig).parse_args_and_config(args)
    found = config.dither_reward_scale
    assert found == {None: 1.0, 1: 0.5, 2: [1.0, 2.0]}[None if scale is None else len(scale)]
    assert config.dither(0).reward_scale == found and config.dither(0).level == 0.01
    assert config.gr_epsilon == ("auto" if scale is None else 1e-4)
    assert (config.dither_seed, config.gr_normalized, config.fused_head) == (7, True, False)
    for value in (2.0, [1.0, 3.0], (1.0, 3.0)):  # from Python a number too
        config = ReditGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, dither_level=0.1, dither_reward_scale=value)
        assert config.dither(0).reward_scale == value


def test_importing_the_package_imports_no_host_and_patches_nothing():
    script = (
        "import sys, redit_fast, redit_fast.integrations; print(*{'trl', 'transformers', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
