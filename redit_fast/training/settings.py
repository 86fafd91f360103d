"""What the settings of the commands that make a run have in common: how they are read, named, written as a command."""

from __future__ import annotations

import shlex
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, field_validator

from redit_fast.known_names import flag
from redit_fast.training.config_values import check_as_meant, flag_words, free_name, is_component, kinds_of


class Settings(BaseModel):
    """The settings of a run: flat, each a key of a YAML file and a flag.

    Raises:
        pydantic.ValidationError (a ValueError): a field of the wrong type or outside its range, or an unknown one.
    """

    # Without inputs in pydantic's own messages: that of rollout may have a password.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)
    COMMAND: ClassVar[str]  # of redit-fast, that makes such a run

    if TYPE_CHECKING:  # fields of each
        model: str | None
        name: str | None
        out_dir: str

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: object, info) -> object:
        check_as_meant(value, kinds_of(cls.model_fields[info.field_name].annotation))
        return value

    @field_validator("name", check_fields=False)
    @classmethod
    def _one_component(cls, name: str | None) -> str | None:
        if name is not None and not is_component(name):
            raise ValueError("needs one printable path component of at most 200 bytes, without slashes or outer spaces")
        return name

    @property
    def defaults(self) -> dict[str, object]:
        """Of each field, None where it has none."""
        return {name: None if f.is_required() else f.default for name, f in type(self).model_fields.items()}

    def with_name(self) -> Self:
        """These settings with a run name: their own, else the first free one of demo, demo-2, ... (or after the model).

        Raises:
            ValueError: the model's folder has a name that no run can have.
        """
        if self.name is not None:
            return self
        name = free_name(self.model, self.out_dir)
        if not is_component(name):
            raise ValueError(f"name: {name!r}, after model {self.model}, is none that a run can have: give a --name")
        return self.model_copy(update={"name": name})

    def command(self, **changes: object) -> str:
        """The shell command that makes this run, `changes` applied; settings at their default are left out."""
        settings = self.model_copy(update=changes)
        defaults = settings.defaults
        words = ["redit-fast", self.COMMAND]
        for name, value in settings:
            if value == defaults[name]:
                continue
            if isinstance(value, bool):
                words.append(flag(name) if value else flag(f"no_{name}"))
            else:
                words += flag_words(name, value)
        return shlex.join(words)

    def resume_command(self) -> str:
        """The shell command that goes on with the run of this name."""
        place = [*flag_words("name", self.name), *flag_words("out_dir", self.out_dir)]
        return shlex.join(["redit-fast", self.COMMAND, "--resume", *place])


def choices_of(annotation: object) -> tuple[str, ...]:
    """The words that a field takes, of Literal[...] and of Literal[...] | None; none where it takes others."""
    kinds = [annotation] if get_origin(annotation) is Literal else list(get_args(annotation))
    kinds = [kind for kind in kinds if kind is not NoneType]
    return get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else ()


def description_of(field: Any, default: str) -> str:
    """A field's help text."""
    words = choices_of(field.annotation)
    listed = f" One of {', '.join(words)}." if words else ""
    return f"{field.description}{listed} Default: {default}."


def word(value: object) -> str:
    return "none" if value is None else str(value)
