"""Every argument of every public function, with values of the wrong type and out of range: one sentence that names the
argument and says what it got. Generated from the signatures: an argument without an entry below fails."""

from __future__ import annotations

import inspect
import math
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import redit_fast as rf
from redit_fast.integrations.openrlhf import PolicyLoss
from redit_fast.integrations.options import DitherOptions, GROptions
from redit_fast.training.rollout.local import generate

ANYTHING = {
    "str": "0.1",
    "list": [1.5],
    "array": np.ones(3, np.float32),
    "none": None,
    "bool": True,
    "float": 1.5,
    "complex": 1j,
    "tensor": torch.tensor(1.5),
    "dtype": torch.int8,
    "object": object(),
}


LONG = 10**5000  # which Python refuses to print


class Argument(NamedTuple):
    good: object
    wrong: dict[str, object]
    given: dict[str, object] = {}  # what else the call then needs
    numpy: tuple = ()  # the same value as numpy has it


def without(*labels):
    return {label: value for label, value in ANYTHING.items() if label not in labels}


def may_be_none(argument, *also):
    wrong = {label: value for label, value in argument.wrong.items() if label not in ("none", *also)}
    return argument._replace(wrong=wrong)


def whole(good, least=0, bits=63, **given):
    wrong = {
        "numpy float": np.float64(2.0),
        "int tensor": torch.tensor(1),
        "least": least - 1,
        "most": 2**bits,
        "longer": LONG,
    }
    return Argument(good, ANYTHING | wrong, given, (np.int64(good), np.uint8(good)))


def number(good, least=None, above=None, most=None, finite=True, **given):
    ranges = {"nan": math.nan, "-inf": -math.inf, "huge": 10**400, "longer": LONG, "fraction": Fraction(10**400)}
    if finite:
        ranges["inf"] = math.inf
    if least is not None:
        ranges["least"] = least - 0.5
    if above is not None:
        ranges["above"] = above
    if most is not None:
        ranges["most"] = most + 0.5
    return Argument(good, without("float") | ranges, given, (np.float64(good), np.float32(good)))


def flag(good, **given):
    return Argument(good, without("bool") | {"int": 1, "numpy bool": np.bool_(True)}, given)


def choice(good, **given):
    return Argument(good, without("str") | {"unknown": "nonsense"}, given)


def of_other_layouts(good):
    """Of the same dtype where there is one, as an argument would be if nobody asked."""
    others = {"sparse": good.detach().to_sparse(), "nested": torch.nested.nested_tensor([good.detach()])}
    if good.ndim == 2:
        others["sparse rows"] = good.detach().to_sparse_csr()
    if good.ndim:
        others["jagged"] = torch.nested.nested_tensor([good.detach()], layout=torch.jagged)
    if good.is_floating_point() and good.ndim:
        others["mkldnn"] = good.detach().float().to_mkldnn()
    if good.dtype != torch.bool:
        others["negated"] = torch._neg_view(good.detach())
    others["quantized"] = torch.quantize_per_tensor(good.detach().float(), 0.1, 0, torch.qint32)
    return others


def tensor(good, *wrong, dtypes=(torch.complex64,), **given):
    """Of `good` also what lies on another device, and of other `dtypes`; and the tensors `wrong`."""
    others = {"meta": good.detach().to("meta")} | {f"{dtype}": good.detach().to(dtype) for dtype in dtypes}
    others |= {f"shape {tuple(other.shape)}": other for other in wrong} | of_other_layouts(good)
    return Argument(good, ANYTHING | others, given)


def anything_but(good, *labels, **wrong):
    return Argument(good, without(*labels) | wrong)


def per_reward(good, **given):
    wrong = {
        "list": ["1", 2.0],
        "ragged": [[1.0, 2.0], 1.0],
        "empty": [],
        "longer": LONG,
        "fraction": Fraction(10**400),
        "empty tensor": torch.ones(0),
        "empty array": np.ones(0),
        "nan": [1.0, math.nan],
        "too many": [1.0, 2.0, 3.0],
        "strings": np.array(["a", "b"]),
        "flags": torch.tensor([True, False]),
        "imaginary": torch.ones(2, dtype=torch.complex64),
        "meta": torch.ones(2, device="meta"),
        **of_other_layouts(torch.ones(2)),
        "infinite tensor": torch.tensor([1.0, math.inf]),
        "matrix": torch.ones(1, 2),
    }
    return Argument(good, without("float", "tensor") | wrong, given, (np.array(good), np.array(good, np.float32)))


B, T, D, V = 2, 3, 4, 9
NOT_FLOAT = (torch.complex64, torch.int64, torch.bool)
NOT_INTEGER = (torch.complex64, torch.float32, torch.bool)
torch.manual_seed(0)
ROW, OTHER_ROW = torch.randn(B, T), torch.randn(B, T + 1)
ADVANTAGES, TARGETS, LOGITS = torch.randn(B), torch.randint(V, (B, T)), torch.randn(B, T, V)
HIDDEN, WEIGHT, BIAS = torch.randn(B, T, D), torch.randn(V, D), torch.randn(V)
PACKED = torch.randn(B * T)


class Uniform(nn.Module):
    """A causal LM to the rollout: it never gets so far."""


def output(logp, entropy):
    return rf.LossOutput(torch.zeros(()), logp, entropy, {}, "logp")


def rows(**packed):
    """What every loss takes beside its log-probs, logits or hidden states."""
    config = rf.LossConfig(beta=0.1, correction="token_mask")
    needed = {"config": config, "ref_logp": ROW, "sampling_logp": ROW}
    row = {
        name: may_be_none(tensor(ROW, OTHER_ROW, dtypes=NOT_FLOAT, **needed)) for name in ("ref_logp", "sampling_logp")
    }
    return {
        "advantages": tensor(ADVANTAGES, OTHER_ROW, ADVANTAGES[1:]),
        "old_logp": may_be_none(tensor(ROW, OTHER_ROW, dtypes=NOT_FLOAT)),
        **row,
        "mask": may_be_none(tensor(ROW > 0, OTHER_ROW)),
        "cu_seqlens": may_be_none(
            tensor(
                torch.tensor([0, 2, B * T]),
                torch.tensor([1, 2, B * T]),
                torch.tensor([0, B * T - 1]),
                torch.tensor([[0, B * T]]),
                dtypes=NOT_INTEGER,
                **packed,
            )
        ),
        "config": anything_but(rf.LossConfig(), dict=dict(loss_type="dapo")),
        "normalizer": Argument(
            2.0,
            without("none", "float", "tensor")
            | {"zero": 0, "negative": -1.0, "nan": math.nan, "inf": math.inf, "zero tensor": torch.tensor(0)}
            | {"huge": 10**400, "longer": LONG, "fraction": Fraction(10**400), "tiny": 1e-50, "large": 1e39}
            | {"tiny tensor": torch.tensor(1e-50, dtype=torch.float64), "tiny fraction": Fraction(1, 10**400)}
            | {"vector": torch.ones(2), "flag tensor": torch.tensor(True), "meta": torch.ones((), device="meta")}
            | {"nan tensor": torch.tensor(math.nan), "complex tensor": torch.tensor(1j)},
            {},
            (np.float64(2.0), np.int32(2)),
        ),
        "masks_of": may_be_none(
            Argument(
                output(ROW, ROW),
                ANYTHING
                | {"tuple": (ROW, ROW), "no logp": output(None, ROW), "other": output(OTHER_ROW, ROW)}
                | {"lists": output(ROW, [1.0])},
            )
        ),
        "step": whole(3, bits=32),
        "seed": whole(5, bits=64),
    }


LOGP = {
    "targets": tensor(TARGETS, TARGETS[:1], dtypes=NOT_INTEGER),
    "temperature": number(0.7, above=0),
    "logit_scale": number(0.5, above=0),
    "softcap": may_be_none(number(9.0, above=0)),
    "mask": may_be_none(tensor(ROW > 0, OTHER_ROW)),
    "entropy": choice("metric"),
    "validate": flag(True),
}
HEAD = {
    "hidden": tensor(HIDDEN, HIDDEN[:1], dtypes=(*NOT_FLOAT, torch.float64)),
    "weight": tensor(WEIGHT, WEIGHT[:, 1:], WEIGHT[0], dtypes=(*NOT_FLOAT, torch.bfloat16)),
    "bias": may_be_none(tensor(BIAS, BIAS[1:], dtypes=(*NOT_FLOAT, torch.bfloat16))),
    "chunk_rows": may_be_none(whole(16, 1)),
}
LOGITS_ARGUMENT = tensor(LOGITS, LOGITS[:1], LOGITS[..., :0], dtypes=(*NOT_FLOAT, torch.float64))
HEAD_LOSS = {
    **HEAD,
    "targets": LOGP["targets"],
    **rows(hidden=HIDDEN.view(B * T, D), targets=TARGETS.view(-1), advantages=ADVANTAGES),
}
NEEDS_A_LOSS = {"advantages": ADVANTAGES, "config": rf.LossConfig()}


def fields(table, **loss_type):
    return {name: argument._replace(given=loss_type) for name, argument in table.items()}


LOSS_CONFIG = {
    "loss_type": choice("grpo"),
    "importance": choice("sequence", loss_type="grpo"),
    "epsilon_low": number(0.1, least=0),
    "epsilon_high": may_be_none(number(0.3, least=0)),
    "delta": may_be_none(number(4.0, above=0)),
    "dual_clip": may_be_none(number(3.0, above=1)),
    "cispo_bound": choice("relative", loss_type="cispo"),
    "beta": number(0.5, least=0),
    "kl": choice("k1"),
    "kl_ratio_correction": flag(True),
    "entropy_coef": number(-0.5),
    "correction": choice("token_mask"),
    "correction_cap": number(2.0, above=0, finite=False),
    "correction_floor": may_be_none(number(0.5, least=0)),
    "off_policy_mask_threshold": may_be_none(number(0.5, least=0)),
    "top_entropy_quantile": number(0.5, least=0, most=1),
    **fields({f"sapo_temperature_{end}": number(0.5, above=0) for end in ("pos", "neg")}, loss_type="sapo"),
    **fields({f"vespo_k_{end}": number(0.5, least=0) for end in ("pos", "neg")}, loss_type="vespo"),
    **fields({f"vespo_lambda_{end}": number(0.5, above=0) for end in ("pos", "neg")}, loss_type="vespo"),
    **fields(
        {
            "clip_cov_ratio": number(0.5, above=0, most=1),
            "clip_cov_lb": number(0.5)._replace(wrong=number(0.5).wrong | {"above the other": 6.0}),
            "clip_cov_ub": number(6.0)._replace(wrong=number(6.0).wrong | {"below the other": 0.5}),
        },
        loss_type="clip_cov",
    ),
    **fields({"kl_cov_ratio": number(0.5, above=0, most=1), "kl_cov_coef": number(0.5, least=0)}, loss_type="kl_cov"),
    "dro_beta": may_be_none(number(0.5, above=0, loss_type="dro")),
    "max_completion_length": may_be_none(whole(9, 1)),
    "temperature": number(0.5, above=0),
    "logit_scale": number(0.5, above=0),
    "softcap": may_be_none(number(9.0, above=0)),
}


def weights():
    return [torch.zeros(2, requires_grad=True)]


REGULARIZER = {
    "gamma": number(0.5, least=0),
    "epsilon": Argument(0.5, number(0.5, above=0).wrong | {"word": "automatic"}, {}, (np.float64(0.5),)),
    "max_norm": may_be_none(number(0.5, above=0)),
    "perturb_max_norm": number(0.5, above=0),
    "normalized": flag(True),
    "rounding": choice("nearest"),
    "keep_first_grad": may_be_none(flag(True)),
    "gamma_warmup_steps": whole(3),
    "every_k_steps": whole(2, 1),
    "compute_dtype": may_be_none(anything_but(torch.bfloat16, name="float32")),
    "seed": whole(5, bits=64),
}
SGD = torch.optim.SGD(weights(), 0.1)
OF_TWO_GROUPS = torch.optim.SGD([{"params": weights(), "perturb": "false"}], 0.1)


def regularized():
    return rf.GradientRegularizer(torch.optim.SGD(weights(), 0.1))


def perturb(**arguments):
    regularizer = regularized()
    regularizer.param_groups[0]["params"][0].grad = torch.ones(2)
    return bool(regularizer.perturb(**arguments))


def level_at(**arguments):
    return rf.Dither(schedule="square_root").level_at(**arguments)


def forced(**arguments):
    with rf.use_backend(**arguments):
        return True


class Call(NamedTuple):
    function: object
    base: dict[str, object]
    arguments: dict[str, Argument]


def adamw(**arguments):
    return rf.RegularizedAdamW(**{"params": weights(), **arguments})


def apply_to(**arguments):
    rf.apply_to(**arguments).remove()


def model():
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen2", vocab_size=9, hidden_size=4, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=1, num_key_value_heads=1)
    )  # fmt: skip


CALLS = {
    "Dither": Call(
        rf.Dither,
        {},
        {
            "distribution": choice("uniform"),
            "level": number(0.5, least=0),
            "reward_scale": Argument(
                [1.0, 2.0],
                {label: value for label, value in per_reward(None).wrong.items()
                 if label not in ("too many", "array")},
                {},
                (np.array([1.0, 2.0]), (1.0, 2.0)),
            ),
            "schedule": choice("cosine"),
            "total_steps": may_be_none(whole(9, 1)),
            "dead_groups": choice("skip"),
            "seed": whole(5, bits=64),
        },
    ),
    "Dither.level_at": Call(level_at, {}, {"step": whole(7, bits=32)}),
    "GradientRegularizer": Call(
        rf.GradientRegularizer,
        {"optimizer": SGD},
        {"optimizer": anything_but(SGD, flags=OF_TWO_GROUPS), **REGULARIZER},
    ),
    "GradientRegularizer.perturb": Call(
        perturb,
        {},
        {"grad_scaler": may_be_none(anything_but(torch.amp.GradScaler("cpu", enabled=False)))},
    ),
    "GradientRegularizer.two_pass": Call(
        lambda **arguments: regularized().two_pass(**arguments),
        {"closure": 3},
        {"closure": anything_but(None), "model": may_be_none(anything_but(None))._replace(given={"closure": print})},
    ),
    "GradientRegularizer.add_param_group": Call(
        lambda **arguments: regularized().add_param_group(**arguments),
        {},
        {"param_group": anything_but({"params": weights()}, flag={"params": weights(), "perturb": 1})},
    ),
    "LossConfig": Call(rf.LossConfig, {}, LOSS_CONFIG),
    "LossConfig.like": Call(
        rf.LossConfig.like,
        {"peer": "trl"},
        {
            "peer": choice("verl"),
            "version": may_be_none(choice("1.16")),
            "loss_type": may_be_none(choice("grpo")),
            "overrides": Argument({}, {}),  # below: every field of every loss
        },
    ),
    "RegularizedAdamW": Call(
        adamw,
        {},
        {
            "params": anything_but(weights(), empty=[]),
            "lr": number(0.5, least=0),
            "betas": anything_but((0.5, 0.5), strings=("0.9", "0.9"), one=(1.0, 0.9), three=(0.1, 0.2, 0.3)),
            "eps": number(0.5, least=0),
            "weight_decay": number(0.5, least=0),
            **REGULARIZER,
        },
    ),
    "advantage_options": Call(
        rf.advantage_options, {"peer": "trl"}, {"peer": choice("verl"), "version": may_be_none(choice("1.16"))}
    ),
    "apply_to": Call(apply_to, {"model": model()}, {"model": anything_but(model()), "eval_logits": flag(False)}),
    "estimate_memory": Call(
        rf.estimate_memory,
        {"R": 64, "D": 8, "V": 99, "dtype": torch.float32, "trainable": True},
        {
            **{name: whole(64, 1) for name in "RDV"},
            "dtype": anything_but(torch.bfloat16, other=torch.float64, name="float32"),
            "trainable": flag(False),
            "chunk_rows": may_be_none(whole(16, 1)),
        },
    ),
    "group_advantages": Call(
        rf.group_advantages,
        {"rewards": torch.arange(16.0).view(8, 2), "group_size": 4},
        {
            "rewards": tensor(torch.rand(8, 2), torch.ones(2, 2, 2), torch.ones(8, 0)),
            "group_size": whole(2, 1)._replace(wrong=whole(2, 1).wrong | {"does not divide": 3}),
            "group_ids": tensor(
                torch.arange(8) // 2,
                torch.arange(7),
                dtypes=(*NOT_INTEGER, torch.int32),
                group_size=None,
            ),
            "reward_weights": may_be_none(per_reward([1.0, 0.5])),
            "dither": may_be_none(anything_but(rf.Dither())),
            "step": whole(3, bits=32, dither=rf.Dither(schedule="cosine")),
            "sample_ids": may_be_none(
                tensor(torch.arange(8), torch.arange(7), dtypes=(*NOT_INTEGER, torch.int32), dither=rf.Dither())
            ),
            "baseline": choice("leave_one_out"),
            "scale": choice("batch"),
            "combine": choice("normalize_then_sum"),
            "eps": number(0.5, least=0),
            "ddof": whole(0)._replace(wrong=whole(0).wrong | {"two": 2}),
        },
    ),
    "grpo_loss": Call(
        rf.grpo_loss,
        {"logits": LOGITS, "targets": TARGETS, **NEEDS_A_LOSS},
        {
            "logits": LOGITS_ARGUMENT,
            "targets": LOGP["targets"],
            **rows(logits=LOGITS.view(B * T, V), targets=TARGETS.view(-1)),
            "inplace": flag(False),
            "grad_scale": may_be_none(tensor(torch.tensor(8.0), torch.ones(2), dtypes=NOT_FLOAT), "tensor"),
        },
    ),
    "linear_grpo_loss": Call(
        rf.linear_grpo_loss, {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **NEEDS_A_LOSS}, HEAD_LOSS
    ),
    "linear_grpo_loss_and_grad_": Call(
        rf.linear_grpo_loss_and_grad_,
        {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "weight_grad": None, **NEEDS_A_LOSS},
        {
            **HEAD_LOSS,
            "weight_grad": may_be_none(
                tensor(torch.zeros(V, D), torch.zeros(V - 1, D), dtypes=(*NOT_FLOAT, torch.bfloat16))
            ),
            "bias_grad": may_be_none(
                tensor(torch.zeros(V), torch.zeros(V - 1), dtypes=(*NOT_FLOAT, torch.bfloat16), bias=BIAS)
            ),
        },
    ),
    "linear_logp": Call(
        rf.linear_logp, {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS}, {**HEAD, **LOGP}
    ),
    "logit_transforms": Call(
        rf.logit_transforms,
        {},
        {
            "model_config": anything_but(
                {"logit_scale": 0.5}, model=nn.Linear(2, 2), nested={"text_config": [1]}, kind=nn.Linear
            )
        },
    ),
    "parameter_groups": Call(
        rf.parameter_groups,
        {"model": nn.Linear(2, 2), "perturb": "weight"},
        {
            "model": anything_but(nn.Linear(3, 3)),
            "perturb": Argument("bias", without("str") | {"no expression": "(", "matches none": "nothing"}),
        },
    ),
    "policy_loss": Call(
        rf.policy_loss,
        {"logp": ROW, **NEEDS_A_LOSS},
        {
            "logp": tensor(ROW, torch.tensor(1.0), dtypes=NOT_FLOAT),
            "entropy": may_be_none(tensor(ROW, OTHER_ROW, dtypes=NOT_FLOAT)),
            **rows(logp=PACKED, advantages=ADVANTAGES),
        },
    ),
    "reset_reference": Call(
        rf.reset_reference,
        {"reference": nn.Linear(2, 2), "policy": nn.Linear(2, 2)},
        {"reference": anything_but(nn.Linear(2, 2)), "policy": anything_but(nn.Linear(2, 2))},
    ),
    "token_logp": Call(
        rf.token_logp,
        {"logits": LOGITS, "targets": TARGETS},
        {"logits": LOGITS_ARGUMENT, **LOGP, "inplace_backward": flag(False)},
    ),
    "unwrap": Call(rf.unwrap, {}, {"optimizer": anything_but(rf.RegularizedAdamW(weights()))}),
    "use_backend": Call(forced, {}, {"name": choice("reference")}),
    "generate": Call(
        generate,
        {"model": Uniform(), "eos_token_ids": 3, "prompts": [[1], [2]], "max_new_tokens": 2},
        {
            "model": anything_but(None),
            "eos_token_ids": anything_but(None, strings=["</s>"], negative=-1),
            "prompts": anything_but(None, empty=[], floats=[[1.0]], negative=[[-1]], no_tokens=[[1], []]),
            "group_size": whole(2, 1),
            "max_new_tokens": whole(2, 1),
            "temperature": number(0.5, least=0),
            "top_p": number(0.5, above=0, most=1),
            "seed": whole(5, bits=64),
            "step": whole(5, bits=32),
            "sample_ids": may_be_none(tensor(torch.arange(2), torch.arange(3), dtypes=(torch.float32, torch.int32))),
        },
    ),
}  # fmt: skip
CALLS["PolicyLoss"] = Call(
    PolicyLoss,
    {},
    {
        "clip_eps_low": number(0.1, least=0),
        "clip_eps_high": number(0.1, least=0),
        "dual_clip": may_be_none(number(3.0, above=1)),
        "token_level_loss": flag(False),
        "policy_loss_type": choice("gspo"),
        "is_correction_level": choice("token"),
        "is_correction_mode": choice("clip"),
        "is_correction_gating": choice("tv"),
        "is_correction_threshold": anything_but(
            (0.5, 2.0), strings=("0.5", "2"), three=(1, 2, 3), negative=(-1.0, 2.0)
        ),
    },
)
CALLS["DitherOptions"] = Call(
    lambda **options: DitherOptions(**options).dither(seed=0),
    {"dither_level": 0.5},
    {f"dither_{name}": argument for name, argument in CALLS["Dither"].arguments.items()}
    | {"dither_seed": may_be_none(whole(5, bits=64))},
)
GR = {name: argument for name, argument in REGULARIZER.items() if name not in ("max_norm", "seed")}
CALLS["GR"] = Call(rf.GR, {}, GR | {"pass2_ratio": choice("pass1")})
CALLS["GR.gamma_at"] = Call(
    lambda **arguments: rf.GR(gamma_warmup_steps=9).gamma_at(**arguments), {}, {"step": whole(5, bits=32)}
)
CALLS["GROptions"] = Call(
    lambda **options: GROptions(**options).gr(),
    {},
    {f"gr_{name}": argument for name, argument in GR.items() if name != "compute_dtype"}
    | {"gr_optimizer": may_be_none(choice("regularized_adamw"))},
)
RESULTS = {"Advantages", "LogpEntropy", "LossOutput"}  # what the functions return: nobody else makes them
OF_TORCH = {"step", "zero_grad", "state_dict", "load_state_dict"}  # torch.optim.Optimizer's own verbs
WITHOUT_A_VALID_CALL = {"generate", "GradientRegularizer.two_pass"}  # other tests make them


def public():
    """Every public function, constructor and method: name -> callable."""
    for name in rf.__all__:
        thing = getattr(rf, name)
        if name in RESULTS:
            continue
        yield name, thing
        for verb, method in vars(thing).items() if isinstance(thing, type) else ():
            if not verb.startswith("_") and verb not in OF_TORCH and verb != "of":  # LossConfig.of is ours
                method = getattr(method, "__func__", method)
                if inspect.isfunction(method) and len(inspect.signature(method).parameters) > 1:
                    yield f"{name}.{verb}", method
    for thing in (generate, PolicyLoss, DitherOptions, GROptions):
        yield thing.__name__, thing


def test_every_argument_of_every_public_function_has_an_entry():
    found = {}
    for name, function in public():
        names = [each for each in inspect.signature(function).parameters if each not in ("self", "cls")]
        found[name] = {each for each in names if not each.startswith("_")}
    assert found == {name: set(call.arguments) for name, call in CALLS.items()}


def what(value):
    """What a message may say of a value."""
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            return ["a nested tensor of "]
        if value.layout != torch.strided or value.is_quantized:
            return [f"{value.dtype} with shape {tuple(value.shape)}"]
        shapes = [str(tuple(value.shape)), str(tuple(value.shape[:-1]))]
        return ["Tensor", str(value.dtype), *shapes, *([] if value.is_meta else [str(value.tolist())])]
    if isinstance(value, torch.optim.Optimizer):
        return what(value.param_groups[0]["perturb"])
    if value is LONG:
        return ["an int of 16610 bits"]
    parts = [repr(value)[:60], str(value), type(value).__name__]
    if isinstance(value, list | tuple | dict | np.ndarray):
        for part in value.values() if isinstance(value, dict) else list(value):
            parts += what(part)
        parts += [f"{len(value)} entries", *([] if len(value) else ["none"])]
    return parts


WRONG = [
    pytest.param(name, argument, label, id=f"{name}-{argument}-{label}")
    for name, call in CALLS.items()
    for argument in call.arguments
    for label in call.arguments[argument].wrong
]


@pytest.mark.parametrize(("name", "argument", "label"), WRONG)
def test_a_value_that_does_not_fit_gets_one_sentence_that_names_the_argument(name, argument, label):
    call = CALLS[name]
    value = call.arguments[argument].wrong[label]
    with pytest.raises((TypeError, ValueError)) as caught:
        call.function(**call.base | call.arguments[argument].given | {argument: value})
    message = str(caught.value)
    assert re.search(rf"(?<![a-z_]){argument}\b", message), message
    assert "\n" not in message and ". " not in message and len(message) < 300, message
    assert any(part in message for part in what(value)), message
    assert "pybind" not in message and "invoked with" not in message
    if isinstance(value, int | float) and not isinstance(value, bool) and label != "float":
        assert type(caught.value) is ValueError or label in ("int", "numpy float"), message


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    if isinstance(expected, torch.optim.Optimizer):
        options = [(x.gr, x.max_norm, x.seed) for x in (found, expected)]
        return repr(found) == repr(expected) and repr(options[0]) == repr(options[1])
    if isinstance(expected, rf.LossConfig):
        return found.text == expected.text and rf.LossConfig.of(found.text) == expected
    return repr(found) == repr(expected)  # numpy's numbers say that they are


GOOD = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name, call in CALLS.items()
    if name not in WITHOUT_A_VALID_CALL
    for argument in call.arguments
]


@pytest.mark.parametrize(("name", "argument"), GOOD)
def test_the_value_that_fits_is_taken_and_numpys_is_the_same(name, argument):
    call = CALLS[name]
    entry = call.arguments[argument]
    if argument == "overrides":
        return
    arguments = call.base | entry.given
    expected = call.function(**arguments | {argument: entry.good})
    for value in entry.numpy:
        if "reward_scale" in argument:  # kept as it came
            call.function(**arguments | {argument: value})
        else:
            exact = np.array_equal(np.float64(value), np.float64(entry.good))
            found = call.function(**arguments | {argument: value})
            assert same(found, expected) or not exact, (found, expected)


@pytest.mark.parametrize("value", [np.ones(2), torch.ones(2), [0.1], object()])
def test_an_override_of_a_preset_is_a_number_a_string_or_a_bool(value):
    for field in ("epsilon_low", "kl", "kl_ratio_correction", "softcap"):
        with pytest.raises(TypeError, match=f"^{field} must be a number, a string or a bool, got "):
            rf.LossConfig.like("trl", loss_type="grpo", **{field: value})


@pytest.mark.parametrize("make", [rf.RegularizedAdamW, lambda p: rf.GradientRegularizer(torch.optim.SGD(p, 0.1))])
@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        [],
        "state",
        {"state": {}},
        {"state": {}, "param_groups": None},
        {"state": {}, "param_groups": []},
        {"state": {}, "param_groups": [{}]},
        {"state": {}, "param_groups": [{"params": None}]},
        {"state": None, "param_groups": [{"params": [0]}]},
        {"state": {0: None}, "param_groups": [{"params": [0]}]},
    ],
)
def test_what_is_no_state_dict_is_refused_and_changes_nothing(make, state):
    optimizer = make(weights())
    before = repr(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match="^state_dict must be what an optimizer's state_dict.. gave"):
        optimizer.load_state_dict(state)
    assert repr(optimizer.state_dict()) == before


def test_a_state_of_adamw_holds_tensors():
    optimizer = rf.RegularizedAdamW(weights())
    saved = optimizer.state_dict() | {"state": {0: {"step": 1, "exp_avg": 0.5}}}
    with pytest.raises(
        TypeError, match="^exp_avg of parameter 0 in state_dict must be a floating-point tensor, got 0.5"
    ):
        optimizer.load_state_dict(saved)


def test_a_group_has_its_parameters():
    with pytest.raises(ValueError, match="^each group of params must hold its parameters as 'params', got a dict of "):
        rf.RegularizedAdamW([{"lr": 1.0}])
    for optimizer in (rf.RegularizedAdamW(weights()), regularized()):
        with pytest.raises(
            ValueError, match="^param_group must hold its parameters as 'params', got a dict of nothing"
        ):
            optimizer.add_param_group({})


def test_a_regular_expression_of_bytes_is_refused():
    with pytest.raises(TypeError, match=r"^perturb must be .* regular expression of str, got re.compile\(b'w'\)"):
        rf.parameter_groups(nn.Linear(2, 2), re.compile(b"w"))


def test_a_parameter_group_has_its_own_numbers_checked():
    for option, value in (("lr", "0.1"), ("lr", torch.tensor(0.1)), ("betas", 0.9), ("eps", -1.0)):
        with pytest.raises((TypeError, ValueError), match=f"^{option} must be "):
            rf.RegularizedAdamW([{"params": weights(), option: value}])
