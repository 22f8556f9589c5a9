"""Write the README's table from a results file.  python -m bench.table bench/results/cpu.json"""

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- bench: written by bench/table.py -->", "<!-- /bench -->"
COLUMNS = {
    "inference": ("inference", 0.0),
    "training": ("training", 0.0),
    "training, dropout 0.1": ("training", 0.1),
}


def model_table(results: dict[str, Any], source: str) -> str:
    """Speed of patched models against stock ones, a row for each size and dtype."""
    speedups = {
        tuple(row["case"].values()): row["speedup"] for row in results["rows"] if row["bench"].startswith("test_model")
    }
    sizes = sorted({key[3:] for key in speedups}, key=lambda size: (size[2] != "float32", size[1], size[0]))
    columns = [(name, *step, padding) for name, step in COLUMNS.items() for padding in ("half", "none")]
    lines = [
        "| hidden | S | dtype | " + " | ".join(f"{name}, {padding} padding" for name, *_, padding in columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for S, hidden, dtype in sizes:
        keys = [(step, dropout, padding, S, hidden, dtype) for _, step, dropout, padding in columns]
        cells = [f"{speedups[key]:.2f}" if key in speedups else "" for key in keys]
        lines.append(f"| {hidden} | {S} | {dtype} | " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += [
        "",
        f"Stock transformers' time over fastbert's, batch 16. `make bench`, {results['machine']}, {versions}, "
        f"{results['date']}, commit {results['commit']}; every time and its spread: [{source}]({source}).",
    ]
    return "\n".join(lines)


def main(path: str) -> None:
    results = json.loads(Path(path).read_text())
    before, _, rest = README.read_text().partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n{model_table(results, path)}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
