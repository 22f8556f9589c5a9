"""Triton's interpreter without what it does for nothing, two thirds of its time. No operation of a kernel is another.

Left out: triton.language is patched anew in every call of a device function; integers are checked for overflow, and the
answer is dropped (`InterpreterOptions.debug` is off); types, shapes and a table of dtypes are made for each operation.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_originals: list[tuple[Any, str, Any]] = []


def hasten() -> None:
    """In this process from now on. A release of Triton with other insides stays as it is: a test says so."""
    with contextlib.suppress(AttributeError):
        for owner, name, replacement in _replacements() if not _originals else ():
            _originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)


@contextlib.contextmanager
def as_triton_has_it() -> Iterator[None]:
    """With all that is left out."""
    hastened = [(owner, name, getattr(owner, name)) for owner, name, _ in _originals]
    for owner, name, original in _originals:
        setattr(owner, name, original)
    yield
    for owner, name, replacement in hastened:
        setattr(owner, name, replacement)


def _replacements() -> list[tuple[Any, str, Any]]:
    launch, patch, check = (
        interpreter.GridExecutor.__call__,
        interpreter._patch_lang,
        TritonSemantic.binary_op_sanitize_overflow_impl,
    )
    find_dtype, unwrap, init_block = interpreter._get_np_dtype, core._unwrap_if_constexpr, tl.block_type.__init__
    patched: set[frozenset[str]] = set()
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], Any] = {}
    plain = {int, float, bool, str, tl.dtype}

    def launch_once_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # the launch before has taken its patches back
        return launch(self, *args, **kwargs)

    @functools.cache
    def languages(fn: Any) -> frozenset[str]:
        """Which modules a patch for this function is of."""
        return frozenset(m.__name__ for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, core))

    def patch_once(fn: Any) -> Any:
        if languages(fn) in patched:
            return interpreter._LangPatchScope()
        patched.add(languages(fn))
        return patch(fn)

    def check_if_answered(self: Any, *args: Any) -> None:
        if self.builder.options.debug:
            check(self, *args)

    def known_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(dtype)
        return dtypes[name]

    def unwrap_quickly(o: Any) -> Any:
        return o if type(o) in plain else o.value if type(o) is tl.constexpr else unwrap(o)

    @functools.cache
    def shape_and_numel(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_and_numel(tuple(type.shape.values) if type.is_block() else ())

    def init_known_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(unwrap_quickly, shape))
        if key not in blocks:
            init_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    return [
        (interpreter.GridExecutor, "__call__", launch_once_patched),
        (interpreter, "_patch_lang", patch_once),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", check_if_answered),
        (interpreter, "_get_np_dtype", known_dtype),
        (core, "_unwrap_if_constexpr", unwrap_quickly),
        (tl.tensor, "__init__", init_tensor),
        (tl.block_type, "__init__", init_known_block),
    ]
