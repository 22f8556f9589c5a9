"""Kill a pretraining run at random moments; its weights must be those of a run that nobody disturbed.

python -m tests.kills [--kills 10] [--seed 0]: also while checkpoints are written, which this slows down.
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

ROOT = Path(__file__).parents[1]
OPTIONS = [
    "--steps",
    "60",
    "--phases",
    "32:0.6,64:0.4",
    "--batch-size",
    "8",
    "--warmup",
    "5",
    "--learning-rate",
    "1e-3",
]
OPTIONS += ["--save-every", "5", "--keep", "2", "--log-every", "5", "--device", "cpu", "--threads", "1"]
CONFIG = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
CHECKPOINT = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "data.json")


def start(run: Path, corpus: Path, config: Path, slow: bool) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLOW_CHECKPOINTS": str(int(slow))}
    command = [sys.executable, "-m", "tests.kills", "--run", "pretrain", "--config", str(config)]
    command += ["--data", str(corpus), "--output", str(run), *OPTIONS]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def be_the_run() -> None:
    """The process that is killed: its checkpoints take half a second each where they are to be slow."""
    import torch

    from fastbert import cli
    from fastbert.training.trainer import PretrainingTrainer

    torch.set_num_threads(1)
    if os.environ["SLOW_CHECKPOINTS"] == "1":
        stock = PretrainingTrainer._save_rng_state

        def slowly(self: PretrainingTrainer, output_dir: str) -> None:
            time.sleep(0.5)
            stock(self, output_dir)

        PretrainingTrainer._save_rng_state = slowly  # type: ignore[method-assign]
    sys.argv = ["fastbert", *sys.argv[2:]]
    cli.main()


def whole_checkpoints(run: Path) -> list[int]:
    """The steps of the checkpoints, each of which must be whole."""
    found = []
    for path in run.glob("checkpoint-*"):
        missing = [name for name in CHECKPOINT if not (path / name).is_file()]
        assert not missing, f"{path} lacks {missing}"
        found.append(json.loads((path / "data.json").read_text())["step"])
    return sorted(found)


def logged(run: Path) -> int:
    """The last step in the log."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus, config = folder / "corpus", folder / "config.json"
        config.write_text(json.dumps({**CONFIG, "max_position_embeddings": 64}))
        prepare = ["-m", "fastbert.cli", "prepare", "fastbert/assets/fables.jsonl", "-o", str(corpus)]
        subprocess.run([sys.executable, *prepare, "--train-vocab", "800"], cwd=ROOT, check=True)
        assert start(folder / "whole", corpus, config, slow=False).wait() == 0

        run, kills, in_checkpoints, last = folder / "killed", 0, 0, 0
        while kills < arguments.kills:
            process = start(run, corpus, config, slow=True)
            while process.poll() is None and logged(run) <= last:
                time.sleep(0.02)  # until it has gone on
            time.sleep(chance.uniform(0.0, 2.0))
            if process.poll() is not None:
                assert process.returncode == 0, "it ended by itself, and not well"
                print(f"finished after {kills} kills: beginning again")
                subprocess.run(["rm", "-rf", str(run)], check=True)
                last = 0
                continue
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            writing = any((run / ".writing").glob("*")) if (run / ".writing").exists() else False
            in_checkpoints += writing
            steps = whole_checkpoints(run)
            assert not steps or steps[-1] >= last, f"checkpoint {last} is lost"
            last = steps[-1] if steps else 0
            print(f"kill {kills}: {'while a checkpoint was written' if writing else 'between'}, last whole one {last}")
        assert start(run, corpus, config, slow=False).wait() == 0
        same = (run / "model/model.safetensors").read_bytes() == (folder / "whole/model/model.safetensors").read_bytes()
        print(f"{kills} kills, {in_checkpoints} of them while a checkpoint was written")
        print("the weights are those of an undisturbed run, bit for bit" if same else "THE WEIGHTS DIFFER")
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    if "--run" in sys.argv:
        be_the_run()
    else:
        main()
