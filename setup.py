"""The C++ extension, and the README as a package index shows it. Everything else is declared in pyproject.toml."""

import re
import warnings
from pathlib import Path

NOT_BUILT = (
    "fastbert is installed without its C++ extension, for which there has to be a compiler of C++17 (pip install -v"
    " shows what failed). Models run all the same, slower on a CPU; `fastbert pretrain` and int8 need it."
)


def absolute_links(markdown: str, repository: str) -> str:
    """Links and pictures that are relative to the repository's root, made absolute, outside of blocks of code."""

    def absolute(match: "re.Match[str]") -> str:
        target = match["target"]
        if target is None or re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target, re.IGNORECASE):
            return match[0]
        kind = "raw" if re.search(r"\.(?:svg|png|jpe?g|gif)$", target) else "blob"
        return f"{match['before']}{repository}/{kind}/HEAD/{target}"

    code = r"^```.*?^```|`[^`\n]+`"
    link = r"(?P<before>\]\(|\b(?:src|srcset|href)=\")(?P<target>[^)\"\s]+)"
    return re.sub(f"{code}|{link}", absolute, markdown, flags=re.DOTALL | re.MULTILINE)


def readme() -> str:
    """README.md with absolute links into project.urls' repository."""
    found = re.search(r'^Repository = "(.+)"$', Path("pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError("pyproject.toml names no Repository under [project.urls]")
    return absolute_links(Path("README.md").read_text(encoding="utf-8"), found[1])


def main() -> None:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
    from setuptools import setup
    from setuptools.errors import CCompilerError, CompileError, PlatformError

    class Build(build_ext):
        def build_extension(self, ext: Pybind11Extension) -> None:
            try:
                super().build_extension(ext)
            except (CCompilerError, CompileError, PlatformError):
                warnings.warn(NOT_BUILT, stacklevel=1)
                raise  # setuptools goes on, for the extension is optional

    setup(
        long_description=readme(),
        long_description_content_type="text/markdown",
        ext_modules=[
            Pybind11Extension(
                "fastbert._C",
                [str(path) for path in sorted(Path("csrc").glob("*.cpp")) if path.stem != "selftest"],
                depends=[str(path) for path in Path("csrc").glob("*.h")],
                cxx_std=17,
                extra_compile_args=["-O3", "-pthread"],
                optional=True,
            ),
        ],
        cmdclass={"build_ext": Build},
    )


if __name__ == "__main__":
    main()
