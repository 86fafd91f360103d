"""The settings of `redit-fast reward-model`: those that `redit-fast train` has too are that one's, with its limits."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from redit_fast.gr.config import Rounding
from redit_fast.training import config_checks, config_values
from redit_fast.training.config import TrainConfig
from redit_fast.training.settings import Settings, description_of, word


def of_train(name: str, **changes: Any) -> Any:
    """A field with the description, the limits and the default of one of `TrainConfig`, but for `changes`."""
    source = TrainConfig.model_fields[name]
    limits = {key: value for limit in source.metadata for key, value in asdict(limit).items()}
    default = {} if source.is_required() else {"default": source.default}
    options: dict[str, Any] = {"description": source.description, **default, **limits, **changes}
    return Field(**options)


class RewardModelConfig(Settings):
    """Every setting of `redit-fast reward-model`.

    Raises:
        pydantic.ValidationError (a ValueError): a field of the wrong type or outside its range, or an unknown one.
    """

    COMMAND = "reward-model"

    model: str = Field(
        description="Hugging Face causal LM, whose head a new score layer takes the place of, or a reward model; a "
        "folder or hub name."
    )
    data: str = Field(
        description="JSONL or Parquet file, or a data set of the hub, hub:OWNER/NAME/CONFIG@SPLIT, with the columns "
        "`prompt`, `chosen` and `rejected`, all texts or all chat messages, and, if wanted, a number `margin`."
    )
    eval_data: str | None = Field(
        None, description="The same of the held-out pairs, with the columns of data; none holds out some of data."
    )
    columns: list[str] | None = of_train(
        "columns",
        description="The columns of data that are read, each NAME or NAME=COLUMN where the data calls it COLUMN, such "
        "as prompt chosen=better rejected=worse; none is all, by their own names.",
    )
    dtype: config_values.DType = of_train("dtype")
    device: config_values.Device = Field(
        "auto", description="Where it runs: auto is a GPU where there is one, else the CPU."
    )
    name: str | None = Field(
        None, description="Folder of the run inside out_dir; none takes the first free one after the model."
    )
    out_dir: str = of_train("out_dir")
    track: list[config_values.Tracker] | None = of_train("track")
    seed: int = of_train("seed", description="Seed of the score layer, data order, dropout and rounding.")
    steps: int = of_train("steps", default=500, description="Optimizer steps.")
    eval_pairs: int = Field(
        500, ge=0, description="Held-out pairs, a fifth of data at most; of eval_data so many at most."
    )
    eval_every: int = of_train("eval_every", default=50)
    pairs_per_step: int = Field(32, ge=1, description="Pairs in a step.")
    center_coefficient: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Weight of the mean of (chosen + rejected)^2, of the rewards of a pair, which keeps them around 0.",
    )
    checkpoint_activations: bool = of_train("checkpoint_activations")
    tokens_per_micro_batch: int = of_train(
        "tokens_per_micro_batch",
        description="Most tokens in one forward and backward pass, unless one pair has more.",
    )
    packing: config_values.Packing = of_train(
        "packing",
        description="Rows without padding, in which what texts share at their beginning is computed once: auto where "
        "the model can and gives the same rewards so, which is tried at the start; on refuses a model that cannot.",
    )
    max_length: int | None = Field(
        None, ge=1, description="Longest prompt and answer together in tokens; none is the model's context."
    )
    long_pairs: Literal["error", "skip"] = Field(
        "error", description="A pair of which a text is too long stops the run at its start, or is left out."
    )
    learning_rate: float = of_train("learning_rate", default=1e-5)
    lr_scheduler_type: config_values.LearningRateSchedule = of_train("lr_scheduler_type")
    warmup_steps: int = of_train("warmup_steps")
    weight_decay: float = of_train("weight_decay")
    adam_beta1: float = of_train("adam_beta1")
    adam_beta2: float = of_train("adam_beta2")
    max_grad_norm: float | None = of_train("max_grad_norm")
    gr_gamma: float = of_train("gr_gamma", default=0.0)
    gr_epsilon: Annotated[float, Field(gt=0)] | Literal["auto"] = of_train("gr_epsilon")
    gr_normalized: bool = of_train("gr_normalized")
    gr_perturb_max_norm: float = of_train("gr_perturb_max_norm")
    gr_rounding: Rounding = of_train("gr_rounding")
    gr_keep_first_grad: bool | None = of_train("gr_keep_first_grad")
    gr_gamma_warmup_steps: int = of_train("gr_gamma_warmup_steps")
    gr_every_k_steps: int = of_train("gr_every_k_steps")
    checkpoint_every: int = of_train("checkpoint_every", default=50)
    keep_checkpoints: int | None = of_train(
        "keep_checkpoints",
        description="Newest checkpoints to keep, besides the best by held-out accuracy; none keeps all.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RewardModelConfig:
        if self.eval_data is not None and not self.eval_pairs:
            raise ValueError("eval_data: eval_pairs is 0, which evaluates nothing")
        config_checks.check_sources(self)
        config_checks.check_tracking(self)
        config_checks.check_schedule(self)
        config_checks.check_gr(self)
        return self


def describe(name: str) -> str:
    """A field's description, choices and default, for --help."""
    field = RewardModelConfig.model_fields[name]
    return description_of(field, "none, it must be given" if field.is_required() else word(field.default))
