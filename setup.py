"""Builds the C++ extension. Everything else is declared in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "fastbert._C",
            ["csrc/bindings.cpp", "csrc/packing.cpp", "csrc/philox.cpp"],
            depends=["csrc/packing.h", "csrc/philox.h"],
            cxx_std=17,
            extra_compile_args=["-O3"],
        ),
    ],
    cmdclass={"build_ext": build_ext},
)
