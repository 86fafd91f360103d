"""Runs code of other libraries and of a model's files, where what they raise is no closed list.

Loaders of weights and tokenizers, the hub, chat templates, a model's own forward pass. Reward functions have theirs in
`rewards`, whose messages name function and sample.
"""

from __future__ import annotations

import re
import traceback


def text_of_error(error: BaseException) -> str:
    """Its text, or that it has none: a `__str__` may raise too."""
    return str(traceback.TracebackException(type(error), error, None))


class Foreign:
    """Whatever the code inside raises, but a Ctrl-C, becomes a ValueError of one sentence that begins with `what`.

    Errors of a type in `plain` have words for a user: their type is left out of the sentence. `error` is the kind of
    ValueError.
    """

    def __init__(
        self,
        what: str,
        plain: type[BaseException] | tuple[type[BaseException], ...] = (),
        error: type[ValueError] = ValueError,
    ):
        self.what, self.plain, self.error = what, plain, error

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is None or isinstance(error, KeyboardInterrupt):
            return
        first = re.split(r"\.\s", " ".join(text_of_error(error).split()))[0]
        name = [] if first and isinstance(error, self.plain) else [kind.__name__]
        raise self.error(": ".join([self.what, *name, *filter(None, [first])])) from error
