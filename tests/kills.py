"""Kill a pretraining run again and again, at random and while it writes checkpoints: its model must not differ.

    python -m tests.kills [--kills 10] [--processes 2]     a table, and exit status 1 if anything was lost

An undisturbed run comes first. Then the same command is killed (-9, every process of it) and started again until it has
been killed so often: half the time at a random moment, half the time while a checkpoint is being written. Steps and
files take longer here than they would. At the end it runs through.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastbert import cli
from fastbert.training import checkpoints
from fastbert.training.pretraining_trainer import PretrainingTrainer
from tests.runs import ROOT, make_corpus

STEPS, SAVE_EVERY = 60, 5
OPTIONS = [
    *("--steps", str(STEPS), "--phases", "32:0.5,64:0.5", "--batch-size", "8", "--learning-rate", "1e-3"),
    *("--warmup", "5", "--log-every", "1", "--save-every", str(SAVE_EVERY), "--keep", "2", "--threads", "1"),
    *("--device", "cpu"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder / "corpus")
        run, undisturbed = folder / "run", folder / "undisturbed"
        start = time.perf_counter()
        _finish(_start(corpus, undisturbed, options.processes, folder / "undisturbed.txt"))
        print(f"undisturbed: {STEPS} steps, {time.perf_counter() - start:.0f} s", flush=True)
        lost = _kill_again_and_again(corpus, run, options.kills, options.processes, chance, folder / "killed.txt")
        _finish(_start(corpus, run, options.processes, folder / "killed.txt"))
        return _judge(run, undisturbed, lost)


def _kill_again_and_again(
    corpus: Path, run: Path, kills: int, processes: int, chance: random.Random, errors: Path
) -> int:
    """The most steps that had to be made again."""
    most = 0
    print(f"{'kill':>4}  {'at step':>7}  {'while':<8}  {'last checkpoint':>15}  {'to make again':>13}", flush=True)
    for number in range(1, kills + 1):
        # so that every kill meets the run under way, and the last one comes before its end
        upto = STEPS * number // (kills + 2) + chance.randrange(SAVE_EVERY)
        process = _start(corpus, run, processes, errors)
        _wait_until(process, lambda upto=upto: _logged(run) >= upto)
        if number % 2 == 0:
            _wait_until(process, lambda: any((run / ".writing").glob("checkpoint-*/*")))
        time.sleep(chance.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        writing = any((run / ".writing").glob("checkpoint-*"))
        logged, last = _logged(run), _last(run)
        again = max(logged - last, 0)
        most = max(most, again)
        doing = "writing" if writing else "training"
        print(f"{number:>4}  {logged:>7}  {doing:<8}  {last:>15}  {again:>13}", flush=True)
    return most


def _judge(run: Path, undisturbed: Path, lost: int) -> int:
    a, b = (load_file(folder / "model/model.safetensors") for folder in (run, undisturbed))
    different = [
        name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]
    logs = [_figures(folder) for folder in (run, undisturbed)]
    left = sorted(path.name for path in run.iterdir() if path.name.startswith("."))
    print(f"weights that differ: {len(different)} of {len(b)} {different[:3] or ''}")
    print(f"the log: {len(logs[0])} records, {'the same' if logs[0] == logs[1] else 'NOT THE SAME'}")
    print(f"steps made again: {lost} at most, of {SAVE_EVERY} between checkpoints; left behind: {left or 'nothing'}")
    good = not different and logs[0] == logs[1] and lost <= SAVE_EVERY and not left
    print("ok" if good else "FAILED")
    return 0 if good else 1


def _start(corpus: Path, run: Path, processes: int, errors: Path) -> "subprocess.Popen[bytes]":
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [*launch, "tests.kills", "pretrain", "--config", str(corpus.parent / "config.json")]
    with errors.open("ab") as said:
        return subprocess.Popen(
            [*command, "--data", str(corpus), "--output", str(run), *OPTIONS],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=said,
            stdout=said,
            start_new_session=True,
        )


def _finish(process: "subprocess.Popen[bytes]") -> None:
    if process.wait() != 0:
        raise SystemExit(f"a run ended with exit status {process.returncode}")


def _wait_until(process: "subprocess.Popen[bytes]", condition: Any) -> None:
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"a run ended before it was killed, with exit status {process.returncode}")
        time.sleep(0.005)


def _figures(run: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    clocks = {"time", "tokens_per_second", "sequences_per_second", "data_wait", "peak_memory_gib"}
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in clocks} for record in records]


def _logged(run: Path) -> int:
    """The last step that the log tells of."""
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    steps = [0]
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:  # being written
            continue
    return steps[-1]


def _last(run: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=0)


def _pretrain_slowly() -> None:
    """What is killed: the command line, but a step takes a while, and so does a file until it is on the disk."""
    flush, compute_loss = checkpoints.flush, PretrainingTrainer.compute_loss

    def slow_flush(path: Path) -> None:
        time.sleep(0.02)
        flush(path)

    def slow_loss(self: PretrainingTrainer, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.03)
        return compute_loss(self, *args, **kwargs)

    checkpoints.flush = slow_flush
    PretrainingTrainer.compute_loss = slow_loss  # type: ignore[method-assign]
    cli.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["pretrain"]:
        _pretrain_slowly()
    else:
        sys.exit(main())
