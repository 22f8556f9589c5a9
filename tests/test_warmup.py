"""How many kernels a model's batches need, and that a warm-up compiles all of them before the first batch."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import current_thread
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from triton import OutOfResources, knobs
from triton.compiler import ASTSource

import fastbert
from fastbert import warmup
from fastbert.kernels import _launch, _product, cross_entropy
from tests.launches import Launches, on_a_gpu, packed_batch, padded_batch, random_lengths
from tests.models import config_of

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),  # of those that are served otherwise
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]
VOCABULARY, LONGEST = 102, 512
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": VOCABULARY}
DEEP = 11  # layers: of the streams 2 + 3 i of LayerNorms after an attention, 16 divides the one of layer 10 first


def make_model(kind: str = "BertForPreTraining", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": LONGEST, **changes}
    return getattr(fastbert, kind)(config_of(kind, **sizes)).to(dtype)


def step(model: nn.Module, draw: random.Random, longest: int) -> None:
    """A training step on a random batch; the forward only in evaluation."""
    seqlens = random_lengths(draw, longest, max(longest, 1024))
    words = isinstance(model, fastbert.BertForPreTraining | fastbert.BertForMaskedLM | fastbert.BertLMHeadModel)
    batch = packed_batch(draw, seqlens, VOCABULARY, labels=model.training and words)
    choices = type(model).__name__.endswith("ForMultipleChoice")
    padded = (choices or not model.training) and draw.random() < 0.3
    if padded:
        batch = padded_batch(draw, seqlens, VOCABULARY)
    elif isinstance(model, fastbert.BertLMHeadModel):
        batch["shift_labels"] = batch.pop("labels")
    elif isinstance(model, fastbert.BertForPreTraining) and model.training:
        batch["next_sentence_label"] = torch.zeros(len(seqlens), dtype=torch.int64)
    elif isinstance(model, fastbert.BertForTokenClassification):
        batch["labels"] = batch["input_ids"] % 3
    if choices:
        batch = {name: t[:, None] for name, t in batch.items()} if padded else batch
        batch["labels"] = torch.zeros(len(seqlens), dtype=torch.int64)
    with torch.set_grad_enabled(model.training):
        output = model(**batch)
    if model.training:
        output.loss.backward()
        model.zero_grad()


def steps(model: nn.Module, batches: int, longest: int = LONGEST) -> None:
    draw = random.Random(0)
    lengths = [*(n for n in (16, 32, 64, 128) if n < longest), longest]
    for i in range(batches):
        step(model, draw, lengths[i % len(lengths)])


@pytest.fixture(scope="module")
def training() -> Launches:
    """Of a hundred pretraining batches, some of them through a deep model, some of long sequences."""
    with pytest.MonkeyPatch.context() as patch, on_a_gpu(specialise=True) as launches:
        patch.setattr(cross_entropy, "LOGITS", 41 * VOCABULARY)  # several chunks of labelled rows
        steps(make_model(num_hidden_layers=DEEP).train(), 20)
        steps(make_model().train(), 70)
        steps(make_model(max_position_embeddings=2048).train(), 10, longest=2048)  # 16 blocks of 128
    return launches


@pytest.fixture(scope="module")
def inference() -> Launches:
    with on_a_gpu(specialise=True) as launches:
        steps(make_model().eval(), 100)
    return launches


# Attention: forward, of 16, 32, 64 and 128 tokens, whose tile longer ones have too, and of longer ones whose lengths
# differ (5); backward, in one block of 16, 32, 64 and 128 (4), in two passes, for equal lengths and others (4).
# LayerNorm, each way: between layers, of the last layer's rows, in the head. The GELU's backward with y and, in the
# head, without. Gradients to rescale: weights, and the decoder's bias, whose size 16 does not divide. Sums with two
# outputs, with three, and of token types.
TRAINING = {"attention": 13, "layer_norm": 6, "embedding": 4, "gelu": 3, "cross": 1, "rescale": 2, "sum": 3}
INFERENCE = {"attention": 5, "layer_norm": 2, "embedding": 1, "gelu": 1}


def by_operator(launches: Launches) -> dict[str, int]:
    counts = dict.fromkeys(TRAINING, 0)
    for kernel, n in launches.variants().items():
        counts[next(name for name in TRAINING if kernel.startswith(f"_{name}"))] += n
    return {name: n for name, n in counts.items() if n}


def test_a_hundred_batches_need_a_kernel_for_each_case_and_no_more(training: Launches, inference: Launches) -> None:
    assert by_operator(training) == TRAINING
    assert by_operator(inference) == INFERENCE


def test_a_product_is_one_kernel_for_any_number_of_rows() -> None:
    for capability in ((8, 0), (9, 0)):
        weight, bias = torch.empty(64, 32, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
        with on_a_gpu(capability, specialise=True) as launches:
            tiles = _product.default_tiles(weight.dtype, _launch.chip(weight.device))
            for M in (1, 16, 17, 512, 1000):
                _product.launch(weight.new_empty(M, 32), weight, bias, "none", True, tiles)
        assert len(launches.compiled) == 1
        assert_each_list_counts(launches)


def test_without_its_do_not_specialize_each_kernel_is_compiled_more_often(training: Launches) -> None:
    assert_each_list_counts(training)


def assert_each_list_counts(launches: Launches) -> None:
    listed = {name for name, kernel in launches.kernels.items() if kernel.do_not_specialize}
    assert listed
    assert {name for name in listed if len(launches.specialised[name]) <= launches.variants()[name]} == set()


def rehearsed(model: nn.Module, training: bool, max_length: int = LONGEST) -> set[tuple[str, str]]:
    with on_a_gpu() as launches, _launch.only_compiling():
        assert warmup.rehearse(model, training, max_length) == []
    assert launches.launched == 0
    return set(launches.compiled)


def test_a_warm_up_compiles_what_a_hundred_batches_need(training: Launches, inference: Launches) -> None:
    assert rehearsed(make_model(), True) == set(training.compiled)
    assert rehearsed(make_model(), False) == set(inference.compiled)


@pytest.mark.parametrize("length", warmup.LENGTHS)
def test_no_class_of_lengths_can_be_left_out(length: int, training: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "LENGTHS", tuple(n for n in warmup.LENGTHS if n != length))
    missing = set(training.compiled) - rehearsed(make_model(), True)
    assert {name for name, _ in missing} <= {name for name in training.kernels if name.startswith("_attention")}
    assert missing


@pytest.mark.parametrize(
    ("hidden_size", "kept"),
    [
        (32, lambda seqlens: len(set(seqlens)) == 1),
        (20, lambda seqlens: sum(seqlens) >= 40),  # one product of q, k and v: k and v begin at multiples of 40 bytes
        (20, lambda seqlens: sum(seqlens) < 40),
    ],
    ids=["ragged", "few-tokens", "many-tokens"],
)
def test_no_kind_of_batch_can_be_left_out(
    hidden_size: int, kept: Callable[[list[int]], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(hidden_size=hidden_size).train()
    with on_a_gpu() as launches:
        steps(model, 25)
    assert set(launches.compiled) <= rehearsed(model, True)
    batches = warmup._batches
    monkeypatch.setattr(warmup, "_batches", lambda *sizes: filter(kept, batches(*sizes)))
    assert set(launches.compiled) - rehearsed(model, True)


CASES: list[Any] = [
    pytest.param("BertForPreTraining", True, {"autocast": True}, (9, 0), id="autocast"),
    pytest.param("BertForPreTraining", True, {"hidden_dropout_prob": 0.0}, (8, 0), id="dropout-in-attention-only"),
    pytest.param("BertForMaskedLM", True, {"attention_probs_dropout_prob": 0.0}, (10, 0), id="masked-lm"),
    pytest.param("BertLMHeadModel", True, {"is_decoder": True}, (9, 0), id="left-to-right"),
    pytest.param("BertForTokenClassification", True, {"dtype": torch.float32}, (9, 0), id="token-classification"),
    pytest.param("BertForMultipleChoice", True, {}, (9, 0), id="multiple-choice"),
    pytest.param("BertForMultipleChoice", False, {}, (9, 0), id="inference-multiple-choice"),
    pytest.param("ElectraForMultipleChoice", True, {}, (9, 0), id="electra-multiple-choice"),
    pytest.param("ElectraForMultipleChoice", False, {}, (9, 0), id="inference-electra-multiple-choice"),
    pytest.param("BertModel", False, {"hidden_size": 40}, (9, 0), id="inference-odd-sizes"),
    pytest.param("BertForMaskedLM", False, {}, (10, 0), id="inference-masked-lm"),
]


@pytest.mark.parametrize(("kind", "training", "changes", "capability"), CASES)
def test_after_a_warm_up_no_batch_compiles(
    kind: str, training: bool, changes: dict[str, Any], capability: tuple[int, int]
) -> None:
    mixed = changes.get("autocast", False)
    options = {"dtype": torch.float32 if mixed else torch.bfloat16, **changes}
    model = make_model(kind, **{name: value for name, value in options.items() if name != "autocast"}).train(training)
    with (
        on_a_gpu(capability) as launches,
        torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext(),
    ):
        with _launch.only_compiling():
            warmup.rehearse(warmup.outermost(model), training, LONGEST)
        ahead = len(launches.compiled)
        steps(model, 25)
        assert launches.launched >= 25 * 5
        assert launches.compiled[ahead:] == []


@pytest.mark.parametrize("max_length", [1, 13, 100, 129])
def test_only_lengths_that_come(max_length: int) -> None:
    model = make_model().train()
    with on_a_gpu() as launches:
        steps(model, 10, longest=max_length)
    ahead = rehearsed(model, True, max_length)
    assert set(launches.compiled) <= ahead
    assert len(ahead) < len(rehearsed(model, True, 512)) or max_length > 128


def test_all_is_as_it_was() -> None:
    model = make_model(dtype=torch.float32).train()
    model.bert.encoder.layer[0].eval()
    model.bert.pooler.requires_grad_(False)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch._C._is_multithreading_enabled()))
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        p.grad = gradients.get(name)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with on_a_gpu():
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))
    torch.manual_seed(7)
    following = torch.rand(3)
    for training in (True, False):
        torch.manual_seed(7)
        rehearsed(model, training)
        assert torch.equal(torch.rand(3), following)
        assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert len(calls) > 20
    assert calls[0]
    assert not any(calls[1:]), "a GPU's backward would run in another thread, and launch"
    assert fastbert.report(model).packed_calls == 1
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0.0, atol=0.0)
    for name, p in model.named_parameters():
        assert p.grad is gradients.get(name)


def test_other_threads_launch_as_ever() -> None:
    model = make_model().eval()
    with on_a_gpu() as launches, ThreadPoolExecutor(1) as other, _launch.only_compiling():
        step(model, random.Random(0), 64)
        assert launches.launched == 0
        other.submit(step, model, random.Random(0), 64).result()
        assert launches.launched > 0


def test_of_several_devices_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    model = make_model().eval()
    with on_a_gpu() as launches:
        for device in (0, 1):
            with _launch.only_compiling(device):
                step(model, random.Random(0), 64)
            assert bool(launches.compiled) == (device == 1)
    assert launches.launched == 0


def test_batches_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    run = warmup._run

    def small_gpu(model: Any, seqlens: list[int], training: bool) -> None:
        if sum(seqlens) >= 512:
            raise torch.OutOfMemoryError
        run(model, seqlens, training)

    monkeypatch.setattr(warmup, "_run", small_gpu)
    with on_a_gpu() as launches, _launch.only_compiling():
        failures = warmup.rehearse(make_model(), True, LONGEST)
    assert {failure.split(" ")[0] for failure in failures} == {"512", "515"}
    assert len(launches.compiled) > 15


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """That PyTorch knows of."""
    monkeypatch.setattr(warmup, "_gpus", lambda _: [0])
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


@pytest.mark.usefixtures("one_gpu")
def test_kernels_are_compiled_in_threads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("BertModel", num_hidden_layers=1).eval()
    compiled: list[tuple[str, bool]] = []  # the thread, and whether it was on the disk
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(tmp_path)
        knobs.compilation.listener = lambda cache_hit, **_: compiled.append((current_thread().name, cache_hit))
        with on_a_gpu(compiles=True) as launches:
            done = fastbert.warm_up(model, max_length=16, threads=2)
            assert (done.kernels, done.threads, done.failures) == (4, 2, ())
            assert str(done).startswith("4 kernels compiled or loaded in ")
            assert {hit for _, hit in compiled} == {False}
            assert {name.rpartition("_")[0] for name, _ in compiled} == {"fastbert warm-up"}
            assert len({name for name, _ in compiled}) == 2
            assert len(list(tmp_path.glob("*/*.cubin"))) == 4
            assert launches.launched == 0
            launches.compiled.clear()
            for seed in range(5):
                step(model, random.Random(seed), 16)
            assert launches.launched == 5 * 5
            assert launches.compiled == []
            assert fastbert.warm_up(model, max_length=16).kernels == 0
        with on_a_gpu(compiles=True, shared=0):
            compiled.clear()
            done = fastbert.warm_up(model, max_length=16)
            assert [hit for _, hit in compiled] == [True] * 4
            assert "cannot be launched: OutOfResources: out of resource: shared memory" in str(done)
            with pytest.raises(OutOfResources):
                step(model, random.Random(0), 16)


@pytest.mark.usefixtures("one_gpu")
def test_what_a_thread_lost_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own fault, `AST constructor recursion depth mismatch`, where several threads parse at a time."""
    model = make_model("BertModel", num_hidden_layers=1).eval()
    make_ir = ASTSource.make_ir
    threads = []

    def disturbed(*arguments: Any, **named: Any) -> Any:
        threads.append(current_thread().name)
        lost = SystemError("AST constructor recursion depth mismatch (before=33, after=125)")
        if len(threads) == 2:
            raise lost
        if len(threads) == 3:
            raise ValueError("at 38:34:") from lost  # as Triton has it of a function that a kernel calls
        return make_ir(*arguments, **named)

    monkeypatch.setattr(ASTSource, "make_ir", disturbed)
    with knobs.cache.scope(), on_a_gpu(compiles=True) as launches:
        knobs.cache.dir = str(tmp_path)
        done = fastbert.warm_up(model, max_length=16, threads=2)
        assert (done.kernels, done.failures) == (4, ())
        assert len(threads) >= 6, "four kernels, and two that were lost; Python itself may have lost another"
        launches.compiled.clear()
        step(model, random.Random(0), 16)
        assert launches.compiled == []


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="Linear is not patched"):
        fastbert.warm_up(nn.Linear(2, 2))
    for max_length in (0, LONGEST + 1):
        with pytest.raises(ValueError, match=rf"max_length must be in \[1, 512\] for this model, but is {max_length}"):
            fastbert.warm_up(make_model(), max_length=max_length)


def test_on_a_cpu_there_is_nothing_to_compile() -> None:
    done = fastbert.warm_up(make_model(), training=True)
    assert (done.kernels, done.threads, done.failures) == (0, 0, ())
    assert str(done) == "nothing to compile: Triton kernels run on a GPU only"


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_does_not_notice() -> None:
    model = make_model(dtype=torch.float32).train()
    reduced = []
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel.register_comm_hook(None, lambda _, bucket: _noted(reduced, bucket))
    inner = warmup.outermost(parallel)
    assert inner is model
    with on_a_gpu() as launches:
        with _launch.only_compiling():
            warmup.rehearse(inner, True, 64)
        assert not reduced
        assert all(p.grad is None for p in model.parameters())
        ahead = len(launches.compiled)
        draw = random.Random(0)
        batch = packed_batch(draw, [7, 64], VOCABULARY, labels=True)
        parallel(**batch, next_sentence_label=torch.zeros(2, dtype=torch.int64)).loss.backward()
        assert launches.compiled[ahead:] == []
    assert reduced
    assert all(p.grad is not None for p in model.parameters())


def _noted(reduced: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    reduced.append(bucket.index())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@pytest.mark.usefixtures("process_group")
def test_under_fsdp_gradients_are_what_they_were() -> None:
    model = make_model(dtype=torch.float32).train()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inner = warmup.outermost(model)
    gradient = torch.ones_like(model.bert.pooler.dense.bias)
    model.bert.pooler.dense.bias.grad = gradient
    with on_a_gpu() as launches:
        with _launch.only_compiling():
            warmup.rehearse(inner, True, 64)
        assert [p.grad is None for p in model.parameters()].count(False) == 1
        assert model.bert.pooler.dense.bias.grad is gradient
        assert (gradient.full_tensor() == 1).all()
        ahead = len(launches.compiled)
        batch = packed_batch(random.Random(0), [7, 64], VOCABULARY, labels=True)
        model(**batch, next_sentence_label=torch.zeros(2, dtype=torch.int64)).loss.backward()
        assert launches.compiled[ahead:] == []
    assert all(p.grad is not None for p in model.parameters())
