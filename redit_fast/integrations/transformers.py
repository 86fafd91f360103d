"""GR for transformers.Trainer and what is built on it: supervised fine-tuning, reward models, your own.

from transformers import Trainer
from redit_fast.integrations.transformers import GRTrainerMixin

class GRTrainer(GRTrainerMixin, Trainer):
    pass

GRTrainer(model, args, train_dataset=data, gr_gamma=1e-3).train()
"""

# ruff: noqa: E402  what is not installed is said before it is imported

from __future__ import annotations

from dataclasses import fields

from redit_fast.extras import need

need("transformers", "redit_fast.integrations.transformers")

import transformers

from redit_fast.integrations.options import GROptions
from redit_fast.integrations.second_pass import HOOKS, SUPPORTED, SecondPassHooks
from redit_fast.integrations.versions import check_hooks


class GRTrainerMixin(SecondPassHooks):
    """Before a class that is a transformers.Trainer: every optimizer step gets the gradient of L + (gamma/2) |grad L|^2
    by a second backward pass over the step's micro-batches, at the decoder layers' parameters + epsilon g1 (see
    `GradientRegularizer`).

    Everything else is the trainer's own: optimizer, clipping (max_grad_norm 0 switches that off, not GR), scheduler,
    callbacks, checkpoints. Losses and metrics that are logged are the first pass's, grad_norm is the combined
    gradient's before clipping; gr/* and time/gr_pass2 (seconds) come beside them. A step with a gradient that is not
    finite, in either pass, is skipped: weights and optimizer state stay, callbacks fire, grad_norm says so.

    The second pass runs the micro-batches whose backward pass returned (through accelerator.backward), with the inputs
    that `_prepare_inputs` gave, their containers copied at every depth. A batch whose exception the host catches
    (auto_find_batch_size, a training_step that skips) is left out of it as of the first. RuntimeError: an input tensor
    was changed in place, or .grad holds a gradient that no such pass left there, as after an exception within a
    backward pass: call zero_grad() where you catch it.

    Args:
        gr_gamma: weight of the penalty; 0 (the default) switches GR off, the run is then the trainer's own.
        gr_epsilon, gr_normalized, gr_perturb_max_norm, gr_rounding, gr_keep_first_grad: fields of `GR`.
        gr_gamma_warmup_steps, gr_every_k_steps: fields of `GR`, a step's number being trainer.state.global_step.
        gr_optimizer: "regularized_adamw" steps by `RegularizedAdamW` (float32 masters of low-precision parameters) with
            the learning rate, betas, epsilon and weight decay of the training arguments; None: the trainer's choice.
        args, kwargs: the trainer's own.

    Raises:
        ValueError, TypeError: an argument out of range, naming it; DeepSpeed or FSDP1 (FSDP2 and DDP work).
            RuntimeError: a version of transformers whose Trainer has other methods, naming the supported ones.
    """

    def __init__(self, *args, **kwargs):
        check_hooks("transformers", transformers, HOOKS, transformers.Trainer, SUPPORTED)
        names = [field.name for field in fields(GROptions)]
        options = GROptions(**{name: kwargs.pop(name) for name in names if name in kwargs})
        options.gr()  # before the trainer is built
        super().__init__(*args, **kwargs)
        self._start_gr(options)
