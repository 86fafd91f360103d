"""Triton's interpreter without work whose result nobody sees: a third of its time. conftest.py imports this where
kernels are interpreted."""

import dataclasses
import functools

import triton.language as tl
from triton.runtime import interpreter

# The check that integers do not overflow ends in an assertion that is made under options.debug alone.
assert not interpreter.interpreter_builder.options.debug
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)

patch_language, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
numpy_type_of_a_scalar = functools.cache(numpy_type)


@functools.cache
def languages(fn):
    """Where a function of a kernel finds the language: in these modules it is patched."""
    return [module for module in fn.__globals__.values() if module is tl or module is tl.core]


def patch_once(fn):
    """A launch patches the language, and each call of a function in a kernel would do it again."""
    if any(tl.core.is_builtin(module.load) for module in languages(fn)):
        return patch_language(fn)
    return interpreter._LangPatchScope()


def kept_numpy_type(dtype):
    """Without a table of all types that is made for each value."""
    scalar = dtype.scalar
    return numpy_type(scalar) if scalar.is_ptr() else numpy_type_of_a_scalar(scalar)


interpreter._patch_lang, interpreter._get_np_dtype = patch_once, kept_numpy_type
