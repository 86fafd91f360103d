"""Two ranks: python -m tests.integrations.trl_rank MODEL_FOLDER UNTIED_MODEL_FOLDER OUT. Every case in this one pair of
processes; what OUT/rank{0,1}.pt then holds is compared with one rank by tests/integrations/test_ranks.py."""

import os
import sys
import warnings

import torch
import trl.trainer.utils as utils
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig
from trl import GRPOTrainer

import redit_fast as rf
from redit_fast.integrations.transformers import GRTrainerMixin
from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer
from redit_fast.integrations.trl.head import FusedHead
from tests.integrations.trl_trainers import GROUP, clipped_inputs, even_ids, logged, new_trainer
from tests.ranks import meet_and_end

OPTIONS = {"gradient_accumulation_steps": 2, "steps": 2, "dither_level": 0.1, "beta": 0.05,
           "gr_gamma": 0.03, "gr_epsilon": 0.05}  # fmt: skip
# Adam's epsilon is far above the gradient of a key's bias, which is rounding: softmax does not see that bias.
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-3, "gradient_accumulation_steps": 2}
# The gradients are so large that "auto" is 0.02 |theta| / |g1|: what multiplied them would show.
AUTO = {"gr_gamma": 1e-3, "gr_epsilon": "auto", "gr_perturb_max_norm": 1e9}


def large_rewards(completion_ids, **_):
    return [4000 * reward for reward in even_ids(completion_ids)]


# Of the trainer, and how FSDP2 shards it: with norm and head in one unit, and with the head as a unit of its own.
SHARDED = {
    "loss": ({"steps": 3, "dither_level": 0.1, "beta": 0.05, "gr_gamma": 0.03, "gr_epsilon": 0.05, **ADAMW}, {}),
    "log-probs": (
        {"steps": 3, "importance_sampling_level": "sequence", "loss_type": "grpo", "rewards": large_rewards,
         "scale_rewards": "none", **AUTO, **ADAMW},
        {"transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer", "Head"]},
    ),
}  # fmt: skip
MIXED = {
    "ddp mixin": {},
    "fsdp2 mixin": {"fsdp": True},
    "own optimizer": {"fsdp": True, "gr_optimizer": "regularized_adamw"},
}


class Head(torch.nn.Linear):
    """A class that can be named as one to shard."""


class Gradients(TrainerCallback):
    """Of every step, as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, *_, model, **__):
        self.steps.append({name: whole(p.grad) for name, p in model.named_parameters()})


class Ranks:
    """Before a trainer's class: on a CPU, where accelerate has no FSDP, it finds the ranks of GPUs."""

    def __init__(self, *args, **kwargs):
        if next(each for each in (*args, *kwargs.values()) if isinstance(each, TrainingArguments)).fsdp:
            PartialState().distributed_type = DistributedType.MULTI_GPU
        super().__init__(*args, **kwargs)
        self.gradients = Gradients()
        self.add_callback(self.gradients)


class RankTrainer(Ranks, ReditGRPOTrainer):
    """Samples by the place in the global batch, not by a rank's random state: TRL's own differ with the ranks."""

    def _generate_single_turn(self, prompt_ids, *_):
        first = self.accelerator.process_index * len(prompt_ids)
        places = range(first, first + len(prompt_ids))
        return [[5 + (7 * place + 3 * i * self.state.global_step + i * i) % 60 for i in range(3 + place % 4)]
                for place in places], None  # fmt: skip


class MixinTrainer(Ranks, GRTrainerMixin, Trainer):
    def compute_loss(self, *args, **kwargs):
        return 300 * super().compute_loss(*args, **kwargs)


class CutShort(MixinTrainer):
    """Its first backward pass raises, and the trainer goes on."""

    def training_step(self, *args):
        try:
            return super().training_step(*args)
        except torch.OutOfMemoryError:
            return torch.zeros(())

    def compute_loss(self, *args, **kwargs):
        return _Raising.apply(super().compute_loss(*args, **kwargs))


class _Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory.")


GATHER = DTensor.full_tensor


def whole(tensor):
    return (GATHER(tensor) if isinstance(tensor, DTensor) else tensor).detach().clone()


def parameters(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def found(trainer):
    """Gradients of every step, weights after the last, and what is logged of GR."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    gr = [{name: entry[name] for name in ("gr/epsilon", "gr/g1_norm", "grad_norm")} for entry in logs]
    return trainer.gradients.steps, parameters(trainer.accelerator.unwrap_model(trainer.model)), gr


def a_model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=False)
    )  # fmt: skip


def some_rows(count=24):
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 33, (7,), generator=draw) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(7) < 1 + i % 4, -100)}
            for i, ids in enumerate(rows)]  # fmt: skip


def a_mixin_trainer(out, batch, cls=MixinTrainer, gr_optimizer=None, model=None, **options):
    """Three steps of 8 rows, under our head."""
    args = TrainingArguments(
        str(out), per_device_train_batch_size=batch, max_steps=3, logging_steps=1, save_strategy="no", report_to="none",
        lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, max_grad_norm=0.5, **{**ADAMW, **options},
    )  # fmt: skip
    model = a_model() if model is None else model
    rf.apply_to(model)
    trainer = cls(model, args, train_dataset=some_rows(), gr_optimizer=gr_optimizer, **AUTO)
    trainer.remove_callback(PrinterCallback)
    return trainer


def a_grpo_trainer(tokenizer, folder, out, name, batch, **options):
    own, _ = SHARDED[name]
    trainer = new_trainer(tokenizer, folder, out, RankTrainer, ReditGRPOConfig,
                          per_device_train_batch_size=batch, **{**own, **options})  # fmt: skip
    trainer.model.get_output_embeddings().__class__ = Head
    return trainer


def trained(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that epsilon stops where the step is 0.02 |theta|
        trainer.train()
    return found(trainer)


def fused_forwards(rank):
    """The gradients of TRL's fused forward by our head, which is a unit of its own, however it has got there; and
    without ranks. In the second of two calls, as the first may compare losses."""
    ids = torch.randint(33, (2, 9), generator=torch.Generator().manual_seed(4))
    results = {}
    for kind in ("alone", "FusedHead", "apply_to, then TRL's", "TRL's, then apply_to"):
        model = a_model()
        if kind.startswith("apply_to"):
            rf.apply_to(model)
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if kind == "FusedHead":
            FusedHead(model, "grad")
        elif kind.endswith("apply_to"):
            rf.apply_to(model)
        if kind != "alone":
            fully_shard(model.lm_head)
            fully_shard(model)
        rows = ids if kind == "alone" else ids[rank : rank + 1]
        for _ in range(2):
            model.zero_grad()
            model(rows, labels=rows, fused_lm_head=True, attention_mask=torch.ones_like(rows)).loss.backward()
        results[kind] = {name: whole(p.grad) for name, p in model.named_parameters()}
    return results


def refusals(tokenizer, folder, out):
    """The sentences that a real configuration of accelerate gets: FSDP1, and packing under FSDP2."""
    fsdp1 = {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}}

    def grpo(**options):
        return new_trainer(tokenizer, folder, out, RankTrainer, ReditGRPOConfig, per_device_train_batch_size=GROUP,
                           ddp_backend="gloo", **options)  # fmt: skip

    asked = [
        lambda: a_mixin_trainer(out, 2, ddp_backend="gloo", **fsdp1),
        lambda: grpo(gr_gamma=0.03, **fsdp1),
        lambda: grpo(packing=True, fsdp=True),
    ]
    sentences = []
    for ask in asked:
        try:
            ask()
        except ValueError as error:
            sentences.append(str(error))
    return sentences


def under_ddp(tokenizer, folder, out, rank):
    """Weights, with and without packing; and what TRL and ours log of a batch of which the second rank has no rows."""
    weights, logs = {}, []
    for packing in (False, True):
        trainer = new_trainer(tokenizer, folder, out, RankTrainer, ReditGRPOConfig, ddp_backend="gloo",
                              per_device_train_batch_size=GROUP, packing=packing, **OPTIONS)  # fmt: skip
        assert trainer.accelerator.num_processes == 2
        use_triton = getattr(utils, "_use_triton", None)
        trainer.train()
        weights[packing] = parameters(trainer.model)
        for compact in (False, True):  # as TRL on a GPU: the second rank then has no rows
            utils._use_triton = lambda device, compact=compact: compact
            inputs = clipped_inputs(3, [[1 - rank] * 3] * 2, trainer.beta)
            logs.append([logged(trainer, cls, inputs) for cls in (GRPOTrainer, ReditGRPOTrainer)])
        utils._use_triton = use_triton
    return weights, logs


def main(folder, untied, out):
    tokenizer, rank, results = AutoTokenizer.from_pretrained(f"{out}/tokenizer"), int(os.environ["RANK"]), {}
    results["ddp"] = under_ddp(tokenizer, folder, out, rank)
    gathered = set()
    DTensor.full_tensor = lambda self, *args, **kwargs: gathered.add(self.shape) or GATHER(self, *args, **kwargs)
    for name, (_, config) in SHARDED.items():
        trainer = a_grpo_trainer(tokenizer, untied, out, name, GROUP, ddp_backend="gloo", fsdp=True, fsdp_config=config)
        results[name] = trained(trainer)
        assert isinstance(trainer.model.lm_head.weight, DTensor)
    for name, options in MIXED.items():
        results[name] = trained(a_mixin_trainer(out, 2, ddp_backend="gloo", **options))
    # transformers' own FSDP2, which shards as it loads
    sharded = Qwen2ForCausalLM.from_pretrained(f"{out}/small", distributed_config=DistributedConfig(fsdp_size=2))
    results["sharded as loaded"] = trained(a_mixin_trainer(out, 2, ddp_backend="gloo", model=sharded))
    results["fused forwards"] = fused_forwards(rank)
    DTensor.full_tensor = GATHER
    results["gathered"] = sorted(tuple(shape) for shape in gathered if len(shape) > 1)
    try:
        a_mixin_trainer(out, 2, cls=CutShort, ddp_backend="gloo", fsdp=True).train()
    except RuntimeError as error:
        results["cut short"] = str(error)
    results["refusals"] = refusals(tokenizer, folder, out)
    torch.save(results, f"{out}/rank{rank}.pt")


if __name__ == "__main__":
    other = os.fork()  # after the imports, which take seconds, and before any thread
    rank = "0" if other else "1"
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")  # which accelerate reads, and MASTER_*
    main(*sys.argv[1:])
    meet_and_end(other)
