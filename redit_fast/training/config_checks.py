"""What settings of a run contradict each other: one sentence, which begins with the name of one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from redit_fast.checks import described
from redit_fast.gr.config import GR
from redit_fast.losses.config import CLIPPED
from redit_fast.training.config_values import JUDGE_KEY, is_url, loaded_reward
from redit_fast.training.data_names import hub_of, names_of

LEAST, LARGEST = 2.0**-126, (2 - 2**-23) * 2.0**127  # that float32 has
HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?|[0-9a-f.]*:[0-9a-f:.]+")  # a name, or an IPv6 address


def check_consistent(config: Any) -> None:
    """Raises a ValueError for the first contradiction in a `TrainConfig`."""
    _check_data(config)
    _check_rewards(config)
    _check_loss(config)
    _check_lora(config)
    _check_rollout(config)
    _check_correction(config)
    check_tracking(config)


def check_tracking(config: Any) -> None:
    """Raises a ValueError where a tracker is there twice."""
    if config.track is not None and len(set(config.track)) < len(config.track):
        raise ValueError(f"track: got {' '.join(config.track)}, needs each once")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A ValueError of the code inside begins with the setting's name."""
    try:
        yield
    except ValueError as error:
        words = str(error).encode("utf-8", "backslashreplace").decode()  # pydantic takes no half of a surrogate pair
        raise ValueError(f"{name}: {words}") from None


def _check_data(config: Any) -> None:
    if config.model is None and config.data is not None:
        raise ValueError("data: the embedded demo has its own; set model to train on a file")
    if config.model is not None and config.data is None:
        raise ValueError("data: training a model of your own needs a JSONL or Parquet file, or hub:OWNER/NAME")
    for name in ("eval_data", "columns", "data_format"):
        if config.model is None and is_set(config, name):
            raise ValueError(f"{name}: the embedded demo has its own data; set model to train on a file")
    if config.data_format is not None and config.columns is not None:
        raise ValueError(
            f"columns: got {' '.join(config.columns)} with data_format {config.data_format}, which says what they are; "
            "needs one of the two"
        )
    check_sources(config)
    if config.eval_data is not None and not config.eval_problems:
        raise ValueError("eval_data: eval_problems is 0, which evaluates nothing")
    if config.model is not None and config.warm_start_steps:
        raise ValueError(f"warm_start_steps: got {config.warm_start_steps}, only the embedded demo has a warm start")


def check_sources(config: Any) -> None:
    """Raises a ValueError for a data set of the hub, or columns, that are no such names."""
    for name in ("data", "eval_data"):
        with _named(name):
            hub_of(getattr(config, name) or "")
    with _named("columns"):
        names_of(config.columns, None)


def _check_rewards(config: Any) -> None:
    check_places(config.rewards)
    for name in ("reward_weights", "reward_scales"):
        numbers = getattr(config, name)
        if numbers is not None and len(numbers) != len(config.rewards):
            raise ValueError(f"{name}: got {len(numbers)} for {len(config.rewards)} reward functions")
    for weight in config.reward_weights or ():
        if abs(weight) > LARGEST:
            raise ValueError(f"reward_weights: got {weight}, needs numbers that float32 has, up to {LARGEST:.1e}")
    for scale in config.reward_scales or ():
        if not LEAST <= scale <= LARGEST:
            raise ValueError(
                f"reward_scales: got {scale}, needs positive numbers that float32 has, {LEAST:.1e} to {LARGEST:.1e}"
            )
    judges = [loaded[1] for loaded in map(loaded_reward, config.rewards) if loaded and loaded[0] == "judge"]
    for name in ("judge_template", "judge_temperature", "judge_top_p", "judge_max_tokens"):
        if is_set(config, name) and not judges:
            raise ValueError(
                f"{name}: got {described(getattr(config, name))}, only a reward judge:PATH or judge:URL has one"
            )
    for name in ("judge_model", "judge_failures"):
        if is_set(config, name) and not any(map(is_url, judges)):
            raise ValueError(f"{name}: got {described(getattr(config, name))}, only a reward judge:URL has one")


def check_places(rewards: Iterable[str]) -> None:
    """Raises a ValueError for a reward model or a judge without a place, or whose URL no sentence and file may have."""
    for kind, place in filter(None, map(loaded_reward, rewards)):
        # A URL whose scheme was left out may have a password too.
        meant = place.startswith("//") or ("@" in place and not Path(place).exists())
        if kind == "judge" and (is_url(place) or meant):
            check_url("rewards: judge", place, "the path of a model or the URL of a server", JUDGE_KEY)
        elif not place or is_url(place):
            raise ValueError(f"rewards: {kind}: needs the path of a model behind the colon")


def _check_loss(config: Any) -> None:
    if config.loss_type == "dro" and config.dro_beta is None:
        raise ValueError("loss_type: dro needs a dro_beta, which has no default")
    if config.loss_type != "dro" and config.dro_beta is not None:
        raise ValueError(f"dro_beta: got {config.dro_beta}, only loss_type dro uses it")
    check_schedule(config)
    for name in ("clip_low", "clip_high"):
        if is_set(config, name) and config.loss_type not in CLIPPED:
            raise ValueError(f"{name}: got {getattr(config, name)}, loss_type {config.loss_type} has no clip range")
    check_gr(config)
    if config.reference_reset_every and not config.beta:
        raise ValueError(
            f"reference_reset_every: got {config.reference_reset_every} without a KL term, needs a beta above 0"
        )


def check_schedule(config: Any) -> None:
    """Raises a ValueError for a warm-up that the learning rate's schedule does not have."""
    if config.warmup_steps and config.lr_scheduler_type == "constant":
        raise ValueError(
            f"warmup_steps: got {config.warmup_steps}, lr_scheduler_type constant has none, constant_with_warmup has"
        )


def check_gr(config: Any) -> None:
    """Raises a ValueError for settings of GR that contradict each other, by the name of one."""
    try:
        flat: dict[str, Any] = {f.name: getattr(config, f"gr_{f.name}", f.default) for f in fields(GR)}
        GR(**flat)
    except ValueError as error:  # of numbers that are not there in float32
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"gr_{name}: {rest}") from None


def _check_lora(config: Any) -> None:
    if config.lora_rank is None:
        for name in ("lora_alpha", "lora_targets"):
            if (value := getattr(config, name)) is not None:
                raise ValueError(f"{name}: got {value} without adapters, needs a lora_rank")
    elif config.model is None:
        raise ValueError(f"lora_rank: got {config.lora_rank}, the embedded demo trains all weights; needs a model")
    elif config.reference_reset_every:
        raise ValueError(
            f"reference_reset_every: got {config.reference_reset_every} with a lora_rank, whose KL term has the model "
            "without adapters as its reference, which is never reset"
        )


def _check_rollout(config: Any) -> None:
    if config.server is None:
        judged = any(loaded and is_url(loaded[1]) for loaded in map(loaded_reward, config.rewards))
        for name in ("rollout_sleep",) if judged else ("rollout_timeout", "rollout_retries", "rollout_sleep"):
            if is_set(config, name):
                raise ValueError(f"{name}: got {getattr(config, name)}, only a rollout by a server has one")
        if config.rollout_ahead:
            raise ValueError(
                f"rollout_ahead: got {config.rollout_ahead} with rollout {config.rollout}, which samples in the "
                "process that trains, where nothing would overlap; needs the URL of a server"
            )
        return
    check_rollout_url(config.server)
    if config.rollout_sleep and config.rollout_ahead:
        raise ValueError(
            "rollout_sleep: got true with rollout_ahead 1, whose server is at work while a step is trained on"
        )
    if config.model is None:
        raise ValueError("rollout: the embedded demo samples by itself, without a server; set model to train your own")


def check_rollout_url(url: str) -> None:
    check_url("rollout", url, "local, paged or the URL of a server", "REDIT_FAST_API_KEY")


def check_url(name: str, url: str, needs: str, key: str) -> None:
    """Raises a ValueError that has nothing of the URL in it, which may have a password. `key`: where one goes."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.port != 0 and HOST.fullmatch(parts.hostname or "")
    except ValueError:  # a port that is no number, brackets that are no address
        fits, parts = None, urlsplit("")
    if not fits or not url.isprintable() or " " in url:
        raise ValueError(f"{name}: needs {needs}, http://HOST:PORT or https://HOST:PORT")
    # A password with a slash in it ends the host: http://name:123/45@host has the path /45@host.
    if parts.username is not None or parts.password is not None or "@" in unquote(parts.path):
        raise ValueError(
            f"{name}: the URL has a user name or a password in it, which would be written into the run's folder; a key "
            f"goes into the variable {key}"
        )
    if "?" in url or "#" in url:
        raise ValueError(f"{name}: the URL has a part after ? or #, needs a host, a port and a path alone")


def _check_correction(config: Any) -> None:
    kind = config.sampler_correction
    if kind == "none":
        for name in ("correction_cap", "correction_floor"):
            if is_set(config, name):
                raise ValueError(
                    f"{name}: got {getattr(config, name)} without a correction, which rollout {config.rollout} has "
                    "only where correction names one"
                )
        return
    if config.correction_floor is not None and config.correction_floor > config.correction_cap:
        raise ValueError(
            f"correction_floor: got {config.correction_floor}, needs a number of at most correction_cap, "
            f"{config.correction_cap}"
        )
    if kind.endswith("mask"):  # the ratio of a sampler that is the policy is 1, up to rounding
        for name, value, wrong, needs in (
            ("correction_cap", config.correction_cap, config.correction_cap <= 1, "above"),
            ("correction_floor", config.correction_floor, (config.correction_floor or 0) >= 1, "below"),
        ):
            if wrong:
                raise ValueError(f"{name}: got {value}, correction {kind} needs a number {needs} 1: it would mask all")
    if config.top_p < 1:
        raise ValueError(
            f"top_p: got {config.top_p} together with correction {kind}, which compares log-probs of all tokens with "
            "those of the sampler, which draws from a part of them; needs top_p 1 or correction none"
        )
    if config.loss_type == "vespo" and kind.startswith("sequence"):
        raise ValueError(f"correction: got {kind}, loss_type vespo has a weight of its own for a sequence")


def is_set(config: Any, name: str) -> bool:
    """Whether a field has another value than its default."""
    return getattr(config, name) != type(config).model_fields[name].default
