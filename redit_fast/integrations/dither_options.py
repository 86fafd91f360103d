"""The `dither_*` options of every integration."""

from __future__ import annotations

from dataclasses import dataclass, fields

from redit_fast.dither import DeadGroups, Distribution, Dither, Schedule


@dataclass
class DitherOptions:
    """The fields of `Dither`; seed None: the host's. Off by default."""

    dither_level: float = 0.0
    dither_distribution: Distribution = "gaussian"
    dither_reward_scale: float = 1.0
    dither_schedule: Schedule = "constant"
    dither_total_steps: int | None = None
    dither_dead_groups: DeadGroups = "apply"
    dither_seed: int | None = None

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
