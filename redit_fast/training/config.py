"""The configuration of a training run: one flat model, whose fields are the keys of a YAML file and the flags."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from redit_fast.dither import DeadGroups, Schedule
from redit_fast.gr.config import Pass2Ratio, Rounding
from redit_fast.losses.config import Correction, LossType
from redit_fast.noise import Distribution
from redit_fast.ops.advantages import Scale
from redit_fast.training import config_checks, config_values
from redit_fast.training.config_values import of_gr
from redit_fast.training.presets import Preset, defaults_of
from redit_fast.training.settings import Settings, choices_of, description_of, word


class TrainConfig(Settings):
    """Every setting of `redit-fast train`. Fields without a default here have one in `presets`.

    Raises:
        pydantic.ValidationError (a ValueError): a field of the wrong type or outside its range, or an unknown one.
    """

    COMMAND = "train"

    model: str | None = Field(
        None, description="Hugging Face causal LM, a folder or hub name; none trains the embedded demo."
    )
    data: str | None = Field(
        None,
        description="JSONL or Parquet file, or a data set of the hub, hub:OWNER/NAME/CONFIG@SPLIT, with a column "
        "`prompt` (text or chat messages) and others; the demo has its own.",
    )
    eval_data: str | None = Field(
        None, description="The same of the held-out problems, with the columns of data; none holds out some of data."
    )
    columns: list[str] | None = Field(
        None,
        min_length=1,
        description="The columns of data that are read, each NAME or NAME=COLUMN where the data calls it COLUMN, such "
        "as prompt=question answer=solution; none is all, by their own names.",
    )
    data_format: config_values.DataFormat | None = Field(
        None,
        description="Reads prompt and answer as a known set has them: gsm8k in question and behind #### in answer, "
        "math in problem and in the last \\boxed{} of solution.",
    )
    dtype: config_values.DType = Field(
        "auto", description="Of the weights: auto is float32 on the CPU, the checkpoint's on a GPU."
    )
    device: config_values.Device = Field(
        "auto", description="Where it runs: auto is a GPU where there is one, the CPU for the demo."
    )
    strategy: config_values.Strategy = Field(
        "ddp", description="Under torchrun: ddp has the whole model on every process, fsdp2 shards it."
    )
    lora_rank: int | None = Field(
        None, ge=1, description="Rank of LoRA adapters, which are trained alone; none trains all weights."
    )
    lora_alpha: int | None = Field(
        None, ge=1, description="Their products are multiplied by this over lora_rank; none is twice the rank."
    )
    lora_targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Names, or their ends, of what has adapters; none is every linear layer of the decoder layers.",
    )
    rewards: list[str] = Field(
        min_length=1,
        description="Reward functions: shipped names, package.module:function looked up in the current folder, the "
        "config's folder and sys.path, model:PATH for a reward model, judge:PATH or judge:URL for a language model as "
        "a judge. Accuracy is the share of completions whose first reward is above 0.",
    )
    reward_weights: list[float] | None = Field(None, description="One weight for each reward function; none is 1 each.")
    reward_scales: list[float] | None = Field(
        None,
        description="Full scale of each reward, which dither_level is relative to; none is what each function says of "
        "itself (reward_scale), or 1.",
    )
    judge_template: str | None = Field(
        None,
        description="Text file of what a judge is asked, with {prompt}, {completion}, {answer} or other columns, for a "
        "grade from 1 to 5; none is a template of the package.",
    )
    judge_model: str | None = Field(
        None, min_length=1, description="Name of the model at a judge's URL; none is the first that the server has."
    )
    judge_temperature: float = Field(0.7, ge=0, description="Sampling temperature of a judge; 0 is greedy.")
    judge_top_p: float = Field(0.8, gt=0, le=1, description="A judge draws the most likely tokens that reach it.")
    judge_max_tokens: int = Field(128, ge=1, description="Tokens after which a judge's answer is cut off.")
    judge_failures: int = Field(
        16, ge=1, description="Questions in a row without an answer after which a judge's URL stops the run."
    )
    name: str | None = Field(
        None, description="Folder of the run inside out_dir; none takes the first free of demo, demo-2, ..."
    )
    out_dir: str = Field("runs", min_length=1, description="Folder of all runs.")
    track: list[config_values.Tracker] | None = Field(
        None,
        min_length=1,
        description="What gets the numbers of metrics.jsonl too: tensorboard, wandb, trackio. One that fails is left, "
        "with a warning.",
    )
    seed: int = Field(
        0, ge=0, lt=2**64, description="Seed of initialisation, data order, sampling, dither and rounding."
    )
    steps: int = Field(ge=1, lt=2**32, description="Reinforcement learning steps.")
    warm_start_steps: int = Field(ge=0, description="Supervised steps before them; the demo only.")
    eval_problems: int = Field(
        500, ge=0, description="Held-out problems, at most a fifth of data; of eval_data at most so many."
    )
    eval_samples: int = Field(
        1,
        ge=1,
        description="Answers to each held-out problem: one is greedy, several are sampled as in training, and pass@k "
        "is the share of problems of which at least one answer is right.",
    )
    eval_every: int = Field(ge=1, description="Steps between held-out evaluations, besides the first and the last.")
    prompts_per_step: int = Field(16, ge=1, description="Prompts in a step.")
    group_size: int = Field(8, ge=2, description="Completions for each prompt.")
    dynamic_sampling: int = Field(
        0,
        ge=0,
        description="Most further rounds of a step, of new prompts in place of groups whose rewards are all equal.",
    )
    overlong: config_values.Overlong = Field(
        "keep", description="Completions that are cut off: in the loss as they are, or masked, as no tokens at all."
    )
    checkpoint_activations: bool = Field(
        False, description="Layers are computed again in the backward pass: less memory, a third more time."
    )
    tokens_per_micro_batch: int = Field(
        16384, ge=1, description="Most tokens in one forward and backward pass, unless one sample has more."
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="Most samples in one pass, instead of tokens_per_micro_batch. Same gradient."
    )
    packing: config_values.Packing = Field(
        "auto",
        description="Rows without padding, in which a prompt is computed once for its completions: auto where the "
        "model can and gives the same log-probs so, which is tried at the start; on refuses a model that cannot.",
    )
    updates_per_rollout: int = Field(
        1,
        ge=1,
        description="Optimizer steps on each step's samples, every one on all of them; ratios are to the policy that "
        "sampled them, as with TRL's num_iterations. Rounding and GR's settings count optimizer steps.",
    )
    max_completion_length: int = Field(ge=1, description="Tokens after which a completion is cut off.")
    max_prompt_length: int | None = Field(
        None, ge=1, description="Longest prompt in tokens; none is the model's context less the completion."
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; the loss uses the same.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draws the most likely tokens that reach it; the loss is of all, as in TRL."
    )
    rollout: str = Field(
        config_values.LOCAL,
        description="Where completions come from: local is the trainer's own loop, paged transformers' continuous "
        "batching, http://HOST:PORT or https://HOST:PORT a vLLM server.",
    )
    rollout_ahead: int = Field(
        0,
        ge=0,
        le=1,
        description="1 has a server sample the next step's completions while this step is trained on, by weights that "
        "are one step older; 0 waits.",
    )
    rollout_timeout: float = Field(
        600.0, gt=0, description="Seconds after which an answer of a server, or of a judge's, is given up."
    )
    rollout_retries: int = Field(3, ge=0, description="Times that a request is made again to a busy or absent server.")
    rollout_sleep: bool = Field(False, description="A server gives its GPU's memory back while a step is trained on.")
    correction: Literal["auto", Correction] = Field(
        "auto",
        description="What a gap between the sampler's log-probs and the policy's does to the loss: its weight of a "
        "token or sequence, exp(policy - sampler), is limited to correction_floor and correction_cap (truncate), or 0 "
        "outside (mask). auto is token_truncate with paged and a server, none with local.",
    )
    correction_cap: float = Field(2.0, gt=0, description="Most that such a weight may be.")
    correction_floor: float | None = Field(None, ge=0, description="Least that it may be; none is 0.")
    preset: Preset | None = Field(
        None,
        description="Learning rate and regularisation of one of the GR paper's runs: grpo has none, kl a KL term, "
        "resets one whose reference is reset, gr gradient regularisation. What is set beside it wins.",
    )
    learning_rate: float = Field(gt=0, description="AdamW learning rate, the highest that lr_scheduler_type has.")
    lr_scheduler_type: config_values.LearningRateSchedule = Field(
        "constant", description="Learning rate over the optimizer steps, by transformers' names."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Optimizer steps in which it rises linearly from 0, which the first one has."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay of the gradient's running mean.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW decay of the squared gradient's running mean.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are clipped to this norm; none is off.")
    loss_type: LossType = Field("dapo", description="Policy loss.")
    clip_low: float = Field(
        0.2,
        ge=0,
        description="How far below 1 the importance ratio goes before the loss clips it. On this trainer's own "
        "completions it is 1 but with updates_per_rollout above 1 and in a second pass with gr_pass2_ratio pass1.",
    )
    clip_high: float | None = Field(None, ge=0, description="The same above 1; none is clip_low.")
    dro_beta: float | None = Field(None, gt=0, description="Weight of the squared log-ratio in loss_type dro alone.")
    advantage_scale: Scale = Field(
        "group", description="What divides an advantage: the deviation of its group, of the batch, or nothing."
    )
    dither_level: float = Field(0.05, ge=0, description="Reward noise, relative to each reward's full scale; 0 is off.")
    dither_distribution: Distribution = Field("gaussian", description="Noise distribution, equal variance in both.")
    dither_schedule: Schedule = Field("constant", description="Noise level over the steps.")
    dither_dead_groups: DeadGroups = Field(
        "center_only",
        description="Groups of equal rewards: center_only dithers them and does not divide, apply dithers them like "
        "any other, as the paper does, skip gives them advantage 0, only dithers them alone.",
    )
    gr_gamma: float = of_gr("gamma", ge=0)
    gr_epsilon: Annotated[float, Field(gt=0)] | Literal["auto"] = of_gr(
        "epsilon", " The word auto finds one that rounding leaves alone."
    )
    gr_normalized: bool = of_gr("normalized")
    gr_perturb_max_norm: float = of_gr("perturb_max_norm", gt=0)
    gr_rounding: Rounding = of_gr("rounding")
    gr_keep_first_grad: bool | None = of_gr("keep_first_grad")
    gr_gamma_warmup_steps: int = of_gr("gamma_warmup_steps", ge=0)
    gr_every_k_steps: int = of_gr("every_k_steps", ge=1)
    gr_pass2_ratio: Pass2Ratio = of_gr("pass2_ratio")
    beta: float = Field(
        0.0, ge=0, description="Weight of the KL term (k3) to a reference, the model as it was before RL; 0 is off."
    )
    reference_reset_every: int = Field(
        0, ge=0, description="Steps between Reference Resets, which make the policy the reference; 0 is never."
    )
    sharpness_every: int = Field(
        0, ge=0, description="Steps between sharpness probes, each of which takes two passes more; 0 is off."
    )
    checkpoint_every: int = Field(ge=1, description="Steps between checkpoints, besides the last.")
    keep_checkpoints: int | None = Field(
        3,
        ge=2,
        description="Newest checkpoints to keep, besides the first and the best by held-out accuracy; none keeps all.",
    )
    long_prompts: Literal["error", "skip"] = Field(
        "error", description="A prompt that is too long stops the run at its start, or is left out."
    )
    system_prompt: str | None = Field(
        None, min_length=1, description="Put before every prompt: as a system message, or as text and a blank line."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Mapping) -> dict:
        return {**defaults_of(values.get("model") is None, values.get("preset")), **values}

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        config_checks.check_consistent(self)
        return self

    @property
    def server(self) -> str | None:
        """The URL that completions come from; None: they are sampled in this process."""
        return None if self.rollout in (config_values.LOCAL, config_values.PAGED) else self.rollout

    @property
    def sampler_correction(self) -> Correction:
        """What `correction` is, or by auto comes to."""
        if self.correction != "auto":
            return self.correction
        return "none" if self.rollout == config_values.LOCAL else "token_truncate"

    @property
    def defaults(self) -> dict[str, object]:
        """Of each field, for this model and preset; None where there is none."""
        return {name: default_of(name, self.model is None, self.preset) for name in type(self).model_fields}

    @property
    def wanted_device(self) -> config_values.Device:
        """`device`, with the demo's own auto."""
        return "cpu" if self.model is None and self.device == "auto" else self.device

    def to_yaml(self, unset: Collection[str] = ()) -> str:
        """A commented YAML file that loads back to this config; the settings `unset` are comments to fill in."""
        blocks = []
        for name, value in self:
            comment = textwrap.fill(describe(name), 100, initial_indent="# ", subsequent_indent="# ")
            setting = yaml.safe_dump({name: value}, sort_keys=False, width=2**30)
            blocks.append(f"{comment}\n{f'# {name}:' + chr(10) if name in unset else setting}")
        return "\n".join(blocks)


def default_of(name: str, demo: bool, preset: str | None = None) -> object:
    """The default of a field, for the embedded demo or for a model of one's own (None also where there is none)."""
    field = TrainConfig.model_fields[name]
    return defaults_of(demo, preset).get(name, None if field.is_required() else field.default)


def choices(name: str) -> tuple[str, ...]:
    """The words that a field takes; none where it takes others."""
    return choices_of(TrainConfig.model_fields[name].annotation)


def describe(name: str) -> str:
    """A field's description, choices and defaults, for --help and --print-config."""
    demo, own = default_of(name, True), default_of(name, False)
    if name == "rewards":
        default = "the demo's own"
    elif demo == own:
        default = word(demo)
    else:
        default = f"{word(demo)} in the demo, {word(own)} with --model"
    return description_of(TrainConfig.model_fields[name], default)
