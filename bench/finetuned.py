"""The table of trainings on real data, each beside the same one by transformers."""

import json
from pathlib import Path

from bench.table import duration, markdown
from fastbert.terminal import counted

RUNS = "finetuning-runs.jsonl"  # of `python -m bench beside`
PUBLISHED = {
    "cola": "52.1",
    "sst2": "93.5",
    "mrpc": "88.9",
    "stsb": "85.8",
    "rte": "66.4",
    "squad": "88.5",
    "ner": "96.4",
    "swag": "81.6",
}
PUBLISHED_FEATURES = {  # of the paper's table 7, for ner
    "embeddings": "91.0",
    "second-to-last": "95.6",
    "last": "94.9",
    "weighted-sum": "95.5",
    "last-4-sum": "95.9",
    "last-4-concat": "96.1",
}


def runs_section(path: Path) -> str:
    """What trainings on real data came to, each beside the same one by transformers: lines of `bench.beside`."""
    if not path.exists():
        return ""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = []
    for it in records:
        main = it["main"]
        low, high = it["intervals"][main]
        ours, theirs = (it["figures"][name] for name in ("fastbert", "transformers"))
        mine, stock = (it["seconds"][name] for name in ("fastbert", "transformers"))
        what = f"{it['task']}, {it['features']} frozen" if it["features"] else it["task"]
        judged = ", ".join(f"{count:,}" for count in it["dev"].values())
        lines.append(
            [
                f"{what}: {it['data']}",
                f"{it['train']:,}, {it['epochs']:g} x, {it['batch_size']} a step, {it['learning_rate']:g}; {judged}",
                main.replace("_", " "),
                f"{100 * ours[main]:.1f} ({100 * low:.1f} to {100 * high:.1f})",
                "" if theirs is None else f"{100 * theirs[main]:.1f}",
                "" if stock is None else f"{duration(mine)}, {duration(stock)}: {stock / mine:.2f} x",
                PUBLISHED_FEATURES[it["features"]] if it["features"] else PUBLISHED.get(it["task"], ""),
            ]
        )
    header = [
        "task",
        "trained on; judged on",
        "figure",
        "fastbert (95 %)",
        "transformers",
        "training, both",
        "BERT-base",
    ]
    first = records[0]
    machine = f"{first['machine']['cpu']}, {counted(first['machine']['threads'], 'thread')}"
    dates = sorted({it["started"][:10] for it in records})
    commits = sorted({it["commit"] for it in records})
    commands = "\n".join(it["command"] for it in records)
    return (
        f"{markdown(header, lines)}\n"
        f"MiniLM-L6, seed 1, {machine}, {' and '.join(dates)}, commit {', '.join(commits)}; times of the training"
        " alone, one after the other. transformers pads to the longest of a batch. BERT-base, for orientation, is"
        " [the paper's](https://arxiv.org/abs/1810.04805): of GLUE the test set, of SQuAD, SWAG and CoNLL-2003 dev.\n\n"
        f"```bash\n{commands}\n```\n"
    )
