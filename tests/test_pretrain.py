"""Pretraining, start to end, on a CPU: against stock transformers, through kills, over several processes."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("accelerate")
pytest.importorskip("sentencex")
pytest.importorskip("tensorboard")
pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")

import fastbert
from fastbert import cli, warmup
from fastbert.data.prepare import prepare, train_vocabulary
from fastbert.data.pretraining import PretrainingBatches, Sampling
from fastbert.data.readers import Reader
from fastbert.data.store import Store
from fastbert.errors import InputError
from fastbert.kernels import _launch
from fastbert.training import metrics
from fastbert.training.plot import plot, read_log
from fastbert.training.pretraining import pretrain
from fastbert.training.pretraining_trainer import PretrainingTrainer
from fastbert.training.recipe import Recipe, config_names, load_config
from tests.optional import needs
from tests.runs import hold_out

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
FABLES = ROOT / "fastbert/assets/fables.jsonl"
VOCABULARY = 800
CPU = torch.device("cpu")
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Aesop's fables with a vocabulary of their own."""
    path = tmp_path_factory.mktemp("corpus") / "fables"
    reader = Reader()
    prepare(
        [FABLES],
        path,
        lambda: train_vocabulary([FABLES], reader, VOCABULARY, cased=False),
        asked={"train": VOCABULARY},
        reader=reader,
    )
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


@pytest.fixture
def recipe(small: str) -> Recipe:
    return Recipe(
        config=small,
        steps=12,
        phases=((32, 0.5), (64, 0.5)),
        sampling=Sampling(batch_size=8, seed=3, window_tokens=2000),
        learning_rate=1e-3,
        warmup=2,
        save_every=4,
        keep=2,
        log_every=1,
    )


def _weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model/model.safetensors")


def _assert_same(a: Path, b: Path, tolerance: float = 0.0) -> None:
    first, second = (_without_tied(_weights(run)) for run in (a, b))
    assert first.keys() == second.keys()
    for name, t in first.items():
        torch.testing.assert_close(t, second[name], rtol=0.0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def _without_tied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in weights.items() if not name.startswith("cls.predictions.decoder.")}


def _figures(run: Path) -> list[dict[str, float]]:
    """A run's log without what depends on the clock."""
    clock = ("tokens_per_second", "sequences_per_second", "data_wait", "peak_memory_gib", "time")
    return [{k: v for k, v in record.items() if k not in clock} for record in read_log(run)]


def _under_torchrun(killed_at: int, run: Path, corpus: Path, config: str, *options: str) -> int:
    """The status of `fastbert pretrain` with the fixture's recipe in two processes, of which one is killed once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "-m"]
    command = [sys.executable, "-m", *torchrun, "tests.pretraining_process", str(killed_at)]
    command += ["pretrain", "--config", config, "--data", str(corpus), "--output", str(run)]
    command += ["--steps", "12", "--phases", "32:0.5,64:0.5", "--batch-size", "8", "--seed", "3"]
    command += ["--learning-rate", "1e-3", "--warmup", "2", "--save-every", "4", "--keep", "2", "--log-every", "1"]
    command += ["--device", "cpu", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=300, capture_output=True, check=False).returncode


def test_a_run(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = pretrain(recipe, corpus, run, device=CPU)
    assert model == run / "model"
    assert {path.name for path in run.iterdir()} == {
        "checkpoint-8",
        "checkpoint-12",
        "log.jsonl",
        "model",
        "run.json",
        "tensorboard",
    }
    log = read_log(run)
    assert [record["step"] for record in log] == list(range(1, 13))
    wanted = {"loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "learning_rate", "grad_norm"}
    wanted |= {"tokens_per_second", "sequences_per_second", "data_wait", "peak_memory_gib"}
    for record in log:
        assert wanted <= record.keys()
        assert record["loss"] == pytest.approx(record["mlm_loss"] + record["nsp_loss"], rel=1e-5)
        assert 0 <= record["mlm_accuracy"] <= 1
        assert 0 <= record["nsp_accuracy"] <= 1
    assert "mfu" not in log[0], "of a CPU no peak is known"
    rates = [record["learning_rate"] for record in log]
    assert rates[:3] == [0.0, 5e-4, 1e-3]
    assert max(rates) == 1e-3
    assert rates[-1] == pytest.approx(1e-4)
    for folder in (run / "checkpoint-12", model):
        stock, loading = transformers.BertForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        assert len(transformers.AutoTokenizer.from_pretrained(folder)) == stock.config.vocab_size == VOCABULARY
    assert list((run / "tensorboard").iterdir())
    pretrain(recipe, corpus, run, device=CPU)  # a finished run has nothing to do
    assert len(read_log(run)) == 12


def _stock_curve(recipe: Recipe, store: Store) -> list[float]:
    """The loss curve of stock transformers: padded batches, PyTorch's AdamW, nothing of the Trainer."""
    torch.manual_seed(recipe.sampling.seed)
    model = transformers.BertForPreTraining(load_config(str(recipe.config), store)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.set_attn_implementation("eager")
    plain = {n for n, _ in model.named_parameters() if "LayerNorm" in n or n.endswith("bias")}
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in plain], "weight_decay": recipe.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, (0.9, 0.999), 1e-6)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, recipe.warmup, recipe.steps)
    curve = []
    for batch in PretrainingBatches(store, recipe.sampling, recipe.phase_steps()):
        lengths = batch["cu_seq_lens_q"].diff().tolist()

        def padded(name: str, fill: int, lengths: list[int] = lengths, batch: dict[str, Any] = batch) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(batch[name][0].split(lengths), True, fill)

        loss = model(
            input_ids=padded("input_ids", store.special.pad),
            token_type_ids=padded("token_type_ids", 0),
            attention_mask=torch.nn.utils.rnn.pad_sequence([torch.ones(n).long() for n in lengths], True),
            labels=padded("labels", -100),
            next_sentence_label=batch["next_sentence_label"],
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    return curve


def test_a_hundred_steps_follow_stock_transformers(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    recipe = replace(recipe, steps=100, phases=((32, 0.9), (64, 0.1)), dropout=0.0, warmup=10, save_every=100)
    pretrain(recipe, corpus, tmp_path / "run", device=CPU)
    actual = torch.tensor([record["loss"] for record in read_log(tmp_path / "run")])
    expected = torch.tensor(_stock_curve(recipe, Store.open(corpus)))
    assert expected[-10:].mean() < 0.95 * expected[:10].mean(), "it learns nothing"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0.0)


class _Stop(Exception):
    pass


def _stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    compute_loss = PretrainingTrainer.compute_loss

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise _Stop
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTrainer, "compute_loss", stop)
        with pytest.raises(_Stop):
            run()


@pytest.mark.parametrize("options", [{}, {"batch_size": None, "batch_tokens": 256}], ids=["sequences", "tokens"])
def test_a_resume_is_exact(
    options: dict[str, Any], recipe: Recipe, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights bit for bit, with dropout, through two stops, one of them in the second phase."""
    recipe = replace(recipe, sampling=replace(recipe.sampling, **options), accumulation=2)
    pretrain(recipe, corpus, tmp_path / "whole", device=CPU)
    for step in (3, 5, 10):
        _stopped_at(step, monkeypatch, lambda: pretrain(recipe, corpus, tmp_path / "stopped", device=CPU))
    pretrain(recipe, corpus, tmp_path / "stopped", device=CPU)
    _assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert _figures(tmp_path / "whole") == _figures(tmp_path / "stopped")


def test_accumulated_batches_are_one_batch(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    recipe = replace(recipe, dropout=0.0)
    pretrain(recipe, corpus, tmp_path / "one", device=CPU)
    pretrain(replace(recipe, accumulation=4), corpus, tmp_path / "four", device=CPU)
    _assert_same(tmp_path / "one", tmp_path / "four", 2e-6)


def test_two_processes_equal_one_and_a_killed_one_is_restarted(
    small: str, recipe: Recipe, corpus: Path, tmp_path: Path
) -> None:
    """Under torchrun, as a user starts them: each has half of the batch. Sharded ones: test_checkpoints.py."""
    corpus = hold_out(corpus)
    recipe = replace(recipe, eval_every=5, dropout=0.0, sampling=replace(recipe.sampling, window_tokens=1 << 24))
    pretrain(recipe, corpus, tmp_path / "one", device=CPU)
    assert _under_torchrun(6, tmp_path / "two", corpus, small, "--dropout", "0", "--eval-every", "5") == 0
    assert (tmp_path / "two.killed").exists()
    _assert_same(tmp_path / "one", tmp_path / "two", 3e-6)
    for a, b in zip(_figures(tmp_path / "one"), _figures(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    first = [read_log(tmp_path / run)[0] for run in ("one", "two")]
    assert first[0]["eval_mlm_loss"] == first[1]["eval_mlm_loss"], "of the same model, to the last bit"
    assert (tmp_path / "two/best/evaluation.json").exists()


@pytest.mark.parametrize(
    "sampling",
    [
        {"objective": "mlm"},
        {"objective": "left-to-right"},
        {"masking": "whole-word"},
        {"masking": "span", "objective": "mlm"},
        {"batch_size": None, "batch_tokens": 300},
        {"static_copies": 2, "max_predictions": 3},
    ],
    ids=str,
)
def test_objectives(sampling: dict[str, Any], recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(replace(recipe, sampling=replace(recipe.sampling, **sampling)), corpus, run, device=CPU)
    names = {"mlm": "BertForMaskedLM", "left-to-right": "BertLMHeadModel"}
    name = names.get(sampling.get("objective", ""), "BertForPreTraining")
    assert json.loads((run / "model/config.json").read_text())["architectures"] == [name]
    _, loading = getattr(transformers, name).from_pretrained(run / "model", output_loading_info=True)
    assert not loading["missing_keys"]
    assert ("nsp_loss" in read_log(run)[0]) == (name == "BertForPreTraining")


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"gradient_checkpointing": True}], ids=str)
def test_options_train(options: dict[str, Any], recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    recipe = replace(recipe, **options, steps=30, warmup=5, learning_rate=5e-3)
    pretrain(recipe, corpus, tmp_path / "run", device=CPU)
    losses = [record["mlm_loss"] for record in read_log(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


def test_weight_decay_spares_norms_and_biases(
    recipe: Recipe, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PretrainingTrainer] = []
    compute_loss = PretrainingTrainer.compute_loss

    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "compute_loss", keep)
    pretrain(replace(recipe, steps=1, phases=((32, 1.0),), warmup=0), corpus, tmp_path / "run", device=CPU)
    model, optimizer = seen[0]._plain, seen[0].optimizer
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if "LayerNorm" in name or name.endswith("bias") else 0.01), name
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-6)


def test_flops_are_those_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.BertConfig(vocab_size=90, attn_implementation="eager", **SMALL)
    model = transformers.BertForPreTraining(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 90, (3, 16)))
    everything = metrics.training_flops(config, torch.tensor([16, 16, 16]), 48)
    next_sentence = 2 * 3 * 32 * 2
    assert everything == 3 * (counter.get_total_flops() - next_sentence)


def _changed(recipe: Recipe, **changes: Any) -> Recipe:
    sampling = {key: changes.pop(key) for key in list(changes) if hasattr(recipe.sampling, key)}
    return replace(recipe, sampling=replace(recipe.sampling, **sampling), **changes)


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"config": "bass"}, "base"),
            ({"config": None}, "exactly one"),
            ({"init_from": "there/is/none", "config": None}, "there/is/none"),
            ({"phases": ((32, 0.5), (128, 0.5))}, "128 tokens, but the model's max_position_embeddings is 64"),
            ({"phases": ((32, 0.5),)}, "add up to 1"),
            ({"phases": ((32, 1.5), (64, -0.5))}, "share"),
            ({"steps": 0}, "steps must be at least 1"),
            ({"warmup": 99}, "warm-up"),
            ({"dropout": 1.0}, "dropout"),
            ({"learning_rate": 0.0}, "learning rate"),
            ({"batch_size": 7, "accumulation": 2}, "7"),
            ({"masking": "words"}, "whole-word"),
            ({"objective": "nsp"}, "objective"),
        ],
        ids=str,
    )
    def test_options(self, changes: dict[str, Any], message: str, recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            pretrain(_changed(recipe, **changes), corpus, tmp_path / "run", device=CPU)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({**SMALL, "num_hiden_layers": 3}, "no num_hiden_layers, perhaps num_hidden_layers"),
            ({**SMALL, "hidden_size": "32"}, "hidden_size must be a number"),
            ({**SMALL, "num_attention_heads": 5}, "no multiple of num_attention_heads"),
            ({**SMALL, "vocab_size": 900}, "vocabulary of 900 tokens, but .* one of 800"),
            ({**SMALL, "model_type": "gpt2"}, "only bert"),
            ({**SMALL, "type_vocab_size": 1}, "type_vocab_size"),
            ([1], "JSON object"),
        ],
        ids=str,
    )
    def test_configurations(self, content: object, message: str, recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            pretrain(replace(recipe, config=str(path)), corpus, tmp_path / "run", device=CPU)
        path.write_text("{")
        with pytest.raises(InputError, match="not JSON"):
            pretrain(replace(recipe, config=str(path)), corpus, tmp_path / "run", device=CPU)

    def test_another_run(self, recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
        pretrain(recipe, corpus, tmp_path / "run", device=CPU)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
        for changes in ({"seed": 4}, {"learning_rate": 2e-3}, {"batch_size": 16}, {"steps": 24}):
            with pytest.raises(InputError, match=f"another run: .*{next(iter(changes))} was"):
                pretrain(_changed(recipe, **changes), corpus, tmp_path / "run", device=CPU)
        after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert before == after
        pretrain(_changed(recipe, save_every=3, keep=9, log_every=2), corpus, tmp_path / "run", device=CPU)

    def test_nothing_to_shard_over(self, recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="several processes"):
            pretrain(replace(recipe, fsdp=True), corpus, tmp_path / "run", device=CPU)

    def test_a_damaged_checkpoint(self, recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
        pretrain(recipe, corpus, tmp_path / "run", device=CPU)
        (tmp_path / "run/model").rename(tmp_path / "model")  # of a finished run no checkpoint is read
        (tmp_path / "run/checkpoint-12/data.json").write_text("{")
        with pytest.raises(InputError, match=r"data\.json cannot be read"):
            pretrain(recipe, corpus, tmp_path / "run", device=CPU)


def test_training_goes_on_from_a_checkpoint_of_somebody_else(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    store = Store.open(corpus)
    transformers.BertForPreTraining(load_config(str(recipe.config), store)).save_pretrained(tmp_path / "theirs")
    recipe = replace(recipe, config=None, init_from=str(tmp_path / "theirs"), learning_rate=1e-12)
    pretrain(recipe, corpus, tmp_path / "run", device=CPU)
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    for name, t in _without_tied(_weights(tmp_path / "run")).items():
        torch.testing.assert_close(t, theirs[name], rtol=0.0, atol=1e-9)


def test_the_configurations_are_those_of_the_papers(corpus: Path) -> None:
    store = replace(Store.open(corpus), vocab_size=30522)
    sizes = {"tiny": 4.4, "mini": 11.2, "small": 28.8, "medium": 41.4, "base": 109.5, "large": 335.1}
    assert sizes.keys() <= set(config_names())
    for name, millions in sizes.items():
        with torch.device("meta"):
            model = fastbert.BertModel(load_config(name, store))
        assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)
    for name in set(config_names()) - sizes.keys():
        config = load_config(name, store)
        assert name == f"l{config.num_hidden_layers}-h{config.hidden_size}-a{config.num_attention_heads}"


def test_curves_are_drawn(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        pretrain(_changed(recipe, seed=seed), corpus, tmp_path / f"run{seed}", device=CPU)
    plot([tmp_path / "run1", tmp_path / "run2"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no log"):
        plot([tmp_path], tmp_path / "none.png")


def test_the_command(
    small: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["pretrain", "--config", small, "--data", str(corpus), "--output", str(tmp_path / "run")]
    options += ["--steps", "4", "--phases", "32:1", "--batch-size", "4", "--log-every", "2", "--device", "cpu"]
    for extra, status, said in (
        ([], 0, "step 4: loss"),
        (["--mask-rates", "0.8,0.3,0.1"], 1, "add up to 1"),
        (["--phases", "32"], 1, "--phases must be like"),
        (["--data", str(tmp_path / "none")], 1, "no such folder"),
        (["--masking", "words"], 2, "whole-word"),
    ):
        monkeypatch.setattr(sys, "argv", ["fastbert", *options, *extra])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert (exit_.value.code or 0) == status
        error = capfd.readouterr().err
        assert said in error
        assert status != 1 or error.strip().splitlines()[-1].startswith("fastbert: ")
    monkeypatch.setattr(sys, "argv", ["fastbert", "plot", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        cli.main()
    assert (tmp_path / "run/curves.png").exists()


def test_entropy_is_the_corpus_own(corpus: Path) -> None:
    store = Store.open(corpus)
    counts = torch.bincount(torch.cat([torch.from_numpy(part.tokens.astype("int64")) for part in store.parts]))
    p = counts[counts > 0].double() / counts.sum()
    assert store.entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-9)
    assert 0 < store.entropy < math.log(VOCABULARY)


@needs("triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # of those that are served otherwise
def test_kernels_are_compiled_before_the_first_step(
    recipe: Recipe, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ahead: list[int] = []

    def warm_up(model: Any, *, training: bool, max_length: int) -> fastbert.WarmUp:
        assert (training, max_length) == (True, 64)
        with _launch.only_compiling():
            assert warmup.rehearse(model, training, max_length) == []
        ahead.append(len(launches.compiled))
        return fastbert.WarmUp(ahead[0], 3.25, 16, ("a kernel is too large",))

    monkeypatch.setattr("fastbert.training.kernels.warm_up", warm_up)
    recipe = replace(recipe, dtype="bf16", sampling=Sampling(batch_size=8, short_sequences=0.5, window_tokens=2000))
    recipe = replace(recipe, non_finite_loss="continue")  # nothing is computed: tensors are what lay in memory
    from tests.launches import on_a_gpu

    with on_a_gpu() as launches:
        pretrain(recipe, corpus, tmp_path / "run", device=CPU)
    assert ahead[0] > 20
    assert launches.compiled[ahead[0] :] == []
    assert launches.launched > 12 * 30
    lines = capsys.readouterr().err.splitlines()
    said = f"fastbert: {ahead[0]} kernels compiled or loaded in 3.2 s, on 16 threads"
    assert lines[lines.index(said) + 1] == "warning: a kernel is too large"
    assert lines.index(said) < next(i for i, line in enumerate(lines) if line.startswith("step 1:"))
    log = read_log(tmp_path / "run")
    assert [record["step"] for record in log] == list(range(13))
    assert (log[0]["kernels"], log[0]["compile_seconds"], log[0]["compile_threads"]) == (ahead[0], 3.25, 16)


def test_a_step_may_have_several_lines_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        '{"step": 4, "loss": 2.0}\n{"step": 4, "kernels": 7}\n{"step": 5, "loss": 1.0}\n'
    )
    assert read_log(tmp_path) == [{"step": 4, "loss": 2.0, "kernels": 7}, {"step": 5, "loss": 1.0}]
