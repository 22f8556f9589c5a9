"""Builds the C++ extension. Everything else is declared in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "fastbert._C",
            [
                "csrc/bindings.cpp",
                "csrc/batches.cpp",
                "csrc/corpus.cpp",
                "csrc/masking.cpp",
                "csrc/packing.cpp",
                "csrc/philox.cpp",
                "csrc/sampling.cpp",
            ],
            depends=[
                "csrc/batches.h",
                "csrc/corpus.h",
                "csrc/masking.h",
                "csrc/packing.h",
                "csrc/parallel.h",
                "csrc/philox.h",
                "csrc/random.h",
                "csrc/sampling.h",
            ],
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread"],
        ),
    ],
    cmdclass={"build_ext": build_ext},
)
