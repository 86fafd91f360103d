"""The `dither_*` and `gr_*` options of every integration."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from redit_fast.checks import check_choice
from redit_fast.dither import DeadGroups, Dither, Schedule
from redit_fast.gr.config import GR, Rounding
from redit_fast.noise import Distribution

if TYPE_CHECKING:
    Epsilon = float | Literal["auto"]
else:

    def Epsilon(text: str) -> float | str:
        """The type of a field as transformers' parser wants it: one that makes a value of a command line's word."""
        return text if text == "auto" else float(text)


def described(default: object, text: str) -> Any:
    """A dataclass field with the help text that command lines show."""
    return field(default=default, metadata={"help": text})


def of_gr(name: str, default: Any = MISSING) -> Any:
    """A dataclass field with the help text of a field of `GR`, and its default where no other is given."""
    source = GR.__dataclass_fields__[name]
    if default is MISSING:
        default = source.default
    return field(default=default, metadata=source.metadata)


@dataclass
class DitherOptions:
    """The fields of `Dither`; seed None: the host's. Off by default."""

    dither_level: float = described(
        0.0, "Half-range of the noise that is added to each reward, relative to dither_reward_scale. 0 switches it off."
    )
    dither_distribution: Distribution = described(
        "gaussian", "Of the noise, with the same variance: 'gaussian' with deviation level / sqrt(3), or 'uniform'."
    )
    dither_reward_scale: float = described(1.0, "The full scale of the rewards.")
    dither_schedule: Schedule = described(
        "constant", "How dither_level changes over the optimizer steps, see docs/noise.md."
    )
    dither_total_steps: int | None = described(
        None, "Optimizer steps of the run, from which the _reverse schedules count back; they need it."
    )
    dither_dead_groups: DeadGroups = described(
        "apply",
        "What becomes of a group whose clean rewards are equal: 'apply' dithers it like any other, 'skip' gives it "
        "advantage 0, 'center_only' divides by 1 instead of the standard deviation, 'only' dithers such groups alone.",
    )
    dither_seed: int | None = described(None, "Seed of the noise. Default: the seed of the run.")

    def dither(self, seed: int) -> Dither | None:
        """`seed` where dither_seed is None; None where dither_level is 0.

        Raises:
            ValueError, TypeError: an option out of range, naming it.
        """
        values = {field.name.removeprefix("dither_"): getattr(self, field.name) for field in fields(DitherOptions)}
        values["seed"] = seed if self.dither_seed is None else self.dither_seed
        try:
            dither = Dither(**values)
        except (ValueError, TypeError) as error:
            raise type(error)(f"dither_{error}") from None
        return dither if dither.level > 0 else None


@dataclass
class GROptions:
    """The fields of `GR` that are for every host, and the optimizer. Off by default."""

    gr_gamma: float = of_gr("gamma", default=0.0)
    gr_epsilon: Epsilon = of_gr("epsilon")
    gr_normalized: bool = of_gr("normalized")
    gr_perturb_max_norm: float = of_gr("perturb_max_norm")
    gr_rounding: Rounding = of_gr("rounding")
    gr_keep_first_grad: bool | None = of_gr("keep_first_grad")
    gr_gamma_warmup_steps: int = of_gr("gamma_warmup_steps")
    gr_every_k_steps: int = of_gr("every_k_steps")
    gr_optimizer: Literal["regularized_adamw"] | None = described(
        None,
        "'regularized_adamw' steps by RegularizedAdamW, which keeps float32 masters of low-precision parameters. "
        "Default: the trainer's optimizer.",
    )

    def gr(self) -> GR:
        """The options, of which a host adds what it knows itself.

        Raises:
            ValueError, TypeError: an option out of range, naming it.
        """
        check_choice("gr_optimizer", self.gr_optimizer, (None, "regularized_adamw"))
        flat: dict[str, Any] = {field.name: getattr(self, f"gr_{field.name}", field.default) for field in fields(GR)}
        try:
            return GR(**flat)
        except (ValueError, TypeError) as error:
            raise type(error)(f"gr_{error}") from None
