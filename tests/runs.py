"""Small pretraining runs on the shipped fables, and how to kill them."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastbert.data.prepare import prepare
from fastbert.data.pretraining import Sampling
from fastbert.data.readers import Reader
from fastbert.data.store import HELD_OUT
from fastbert.data.vocabulary import load_tokenizer
from fastbert.training import checkpoints
from fastbert.training.pretraining import pretrain
from fastbert.training.pretraining_trainer import PretrainingTrainer
from fastbert.training.recipe import Recipe
from tests.pretraining_process import kill_at, shard_on_a_cpu
from tests.stores import full_disk

ROOT = Path(__file__).parents[1]
FABLES = ROOT / "fastbert/assets/fables.jsonl"
CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def make_corpus(folder: Path) -> Path:
    """The fables as a token store, and a configuration for them beside it."""
    command = [sys.executable, "-m", "fastbert", "prepare", str(FABLES), "-o", str(folder)]
    subprocess.run([*command, "--train-vocab", "600", "--workers", "1"], check=True, cwd=ROOT, capture_output=True)
    (folder.parent / "config.json").write_text(json.dumps(CONFIG))
    return folder


def hold_out(corpus: Path, fables: int = 70) -> Path:
    """A copy of the store with a held-out part beside its own: some of the fables that it was made of."""
    path = shutil.copytree(corpus, corpus.with_name(f"{corpus.name}-held"))
    some = corpus.with_name("some.jsonl")
    some.write_text("".join(FABLES.read_text(encoding="utf-8").splitlines(keepends=True)[:fables]), encoding="utf-8")
    prepare([some], path / HELD_OUT, lambda: load_tokenizer(str(corpus)), asked={}, reader=Reader())
    return path


def recipe(corpus: Path, **changes: Any) -> Recipe:
    """12 steps with dropout, 7 of 32 tokens and 5 of 64; a checkpoint every 4, of which one is kept."""
    options: dict[str, Any] = {
        "config": str(corpus.parent / "config.json"),
        "steps": 12,
        "phases": ((32, 0.6), (64, 0.4)),
        "sampling": Sampling(batch_size=8, window_tokens=20_000),
        "warmup": 2,
        "learning_rate": 1e-3,
        "log_every": 1,
        "save_every": 4,
        "keep": 1,
        "threads": 1,
    }
    return Recipe(**{**options, **changes})


def run(corpus: Path, output: Path, **changes: Any) -> None:
    torch.set_num_threads(1)
    pretrain(recipe(corpus, **changes), corpus, output, device=torch.device("cpu"))


def run_killed(moment: str, step: int, corpus: Path, output: Path) -> int:
    """Run in another process that is killed (-9) when it comes to that moment of a checkpoint: its exit status."""
    return _in_processes([(_killed, (moment, step, corpus, output))])[0]


def run_in_two_processes(
    corpus: Path,
    output: Path,
    *,
    full: tuple[int, int, int] | None = None,
    killed_at: int | None = None,
    broken: tuple[str, int, int] | None = None,
    **changes: Any,
) -> tuple[list[int], str]:
    """Their exit statuses, and what they said.

    full: step, rank, bytes: that one cannot write more from that checkpoint on.  killed_at: the first is, in that step.
    broken: what, step, rank: that one's loss or gradient is not finite there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = output.parent / "stderr"
    shared = (port, full, killed_at, broken, corpus, output, errors, changes)
    statuses = _in_processes([(_one_of_two, (own, *shared)) for own in (0, 1)])
    return statuses, "".join(path.read_text() for path in sorted(errors.parent.glob(f"{errors.name}-*")))


def _in_processes(calls: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> list[int]:
    """Exit statuses. The processes are forks of one that has imported everything; one that hangs is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs"])
    processes = [context.Process(target=target, args=args) for target, args in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in processes]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model/model.safetensors")


def assert_same_weights(actual: Path, expected: Path) -> None:
    """Bitwise."""
    a, b = weights(actual), weights(expected)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


@contextlib.contextmanager
def full_disk_while_saving(bytes_left: int, step: int, rank: int = 0) -> Iterator[None]:
    """For one process, at the checkpoint of that step and later ones."""
    save = PretrainingTrainer._save_checkpoint

    def saved(self: PretrainingTrainer, *args: Any) -> None:
        full = self.state.global_step >= step and self.args.process_index == rank
        with full_disk(bytes_left) if full else contextlib.nullcontext():
            save(self, *args)

    with mock.patch.object(PretrainingTrainer, "_save_checkpoint", saved):
        yield


def _infinite_gradient(loss: Tensor) -> Tensor:
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


BREAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "the loss": lambda loss: loss + math.nan,  # its gradient is what it was
    "the gradient": _infinite_gradient,
    "both": lambda loss: loss * math.inf,
}


@contextlib.contextmanager
def not_finite(what: str, step: int, rank: int = 0, part: int = 0) -> Iterator[None]:
    """In that step, counted from 1, of one process, in that one of its accumulated batches."""
    compute_loss = PretrainingTrainer.compute_loss
    parts: Counter[PretrainingTrainer] = Counter()  # of that step, of each run

    def computed(self: PretrainingTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:

        def broken(**inputs: Any) -> Any:
            outputs = model(**inputs)
            outputs.loss = BREAKS[what](outputs.loss)
            return outputs

        here = self.state.global_step + 1 == step and self.args.process_index == rank
        parts[self] += here
        return compute_loss(self, broken if here and parts[self] == part + 1 else model, *args, **kwargs)

    with mock.patch.object(PretrainingTrainer, "compute_loss", computed):
        yield


def _die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(function: Callable[..., Any], then: Callable[..., None]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        then(*args, **kwargs)

    return called


def _half_a_save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
    whole = io.BytesIO()
    _SAVE(content, whole)
    Path(file).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    _die()


def _half_a_removal(folder: Path, *args: Any, **kwargs: Any) -> None:
    if Path(folder).name.startswith("old-") and Path(folder).exists():
        next(file for file in sorted(Path(folder).iterdir())).unlink()
        _die()


_SAVE = torch.save
MOMENTS: dict[str, Callable[[], Any]] = {
    "the weights are written": lambda: mock.patch.object(PretrainingTrainer, "_save_optimizer_and_scheduler", _die),
    "the optimiser is half written": lambda: mock.patch.object(torch, "save", _half_a_save),
    "all is written": lambda: mock.patch.object(checkpoints, "publish", _die),
    "half is flushed": lambda: mock.patch.object(checkpoints, "flush", _after(checkpoints.flush, _die)),
    "all is flushed": lambda: mock.patch.object(os, "rename", _die),
    "it has its name": lambda: mock.patch.object(os, "rename", _after(os.rename, _die)),
    "the one before is half removed": lambda: mock.patch.object(shutil, "rmtree", _half_a_removal),
}


def _killed(moment: str, step: int, corpus: Path, output: Path) -> None:
    save = PretrainingTrainer._save_checkpoint

    def saved(self: PretrainingTrainer, *args: Any) -> None:
        with MOMENTS[moment]() if self.state.global_step == step else contextlib.nullcontext():
            save(self, *args)

    PretrainingTrainer._save_checkpoint = saved  # type: ignore[method-assign]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        run(corpus, output)


def _one_of_two(
    own: int,
    port: int,
    full: tuple[int, int, int] | None,
    killed_at: int | None,
    broken: tuple[str, int, int] | None,
    corpus: Path,
    output: Path,
    errors: Path,
    changes: dict[str, Any],
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(RANK=str(own), LOCAL_RANK=str(own), OMP_NUM_THREADS="1")
    if changes.get("fsdp"):
        shard_on_a_cpu()
    if killed_at is not None:
        kill_at(killed_at, output)
    with open(f"{errors}-{own}", "w") as said:
        os.dup2(said.fileno(), 2)
        with (
            full_disk_while_saving(full[2], *full[:2]) if full is not None else contextlib.nullcontext(),
            not_finite(*broken) if broken is not None else contextlib.nullcontext(),
        ):
            run(corpus, output, **changes)
