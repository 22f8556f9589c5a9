"""Triton; or where there is none, as on macOS and Windows, what lets the kernels be imported, but not launched."""

from typing import Any

from fastbert import _library

if _library.HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
else:

    class _Missing:
        """What is made of `@triton.jit`, `@triton.jit(...)` and `tl.constexpr(...)`."""

        def __init__(self, *_args: Any, **_options: Any) -> None: ...

        def __call__(self, _function: Any) -> "_Missing":
            return self

        def run(self, *_args: Any, **_options: Any) -> Any:
            raise ModuleNotFoundError("a kernel needs Triton, which is not installed", name="triton")

    class tl:  # type: ignore[no-redef]
        constexpr = _Missing

    class triton:  # type: ignore[no-redef]
        jit = _Missing

        @staticmethod
        def cdiv(x: int, y: int) -> int:
            return -(-x // y)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << max(0, n - 1).bit_length()

    TensorDescriptor = _Missing

__all__ = ["TensorDescriptor", "tl", "triton"]
