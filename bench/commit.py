"""Which commit a run is of: from COMMIT, from git, or from a file that came along with a tree without its history.

`make commit-file` writes the file: the commit, and a digest of the sources, so that a tree that was changed since, or
another one, cannot pass for it.
"""

import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ".commit"
UNKNOWN = "unknown"
SOURCES = "bench", "csrc", "fastbert", "kernels", "tests"
SUFFIXES = ".py", ".cpp", ".h", ".json", ".toml"


def commit(root: Path = ROOT) -> str:
    """Of the tree, with what has to be said about it; UNKNOWN where nobody knows."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    if (root / ".git").exists():  # a file in a worktree; without one, git would answer for a folder above
        return _described(root) or UNKNOWN
    try:
        name, digest = (root / FILE).read_text().split()
    except (OSError, ValueError):
        return UNKNOWN
    return name if digest == _digest(root) else f"{name}-changed"


def write(root: Path = ROOT) -> str:
    """Keep the commit in FILE.

    Raises:
        ValueError: if git does not know it.
    """
    name = _described(root)
    if not name:
        raise ValueError(f"git knows no commit of {root}")
    (root / FILE).write_text(f"{name} {_digest(root)}\n")
    return name


def _described(root: Path) -> str:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _digest(root: Path) -> str:
    """Of the sources, results left out; a link's target counts once, in its own place."""
    digest = hashlib.sha256()
    found = (
        Path(folder, name)
        for source in SOURCES
        for folder, _, names in os.walk(root / source)
        for name in names
        if name.endswith(SUFFIXES) and root / "bench/results" not in Path(folder, name).parents
    )
    for path in sorted(found):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(f"{FILE}: {write()}: take it along")
