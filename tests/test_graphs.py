"""CUDA graphs around a model: all but the capture, on a CPU with a tape; and the capture, where there is a GPU."""

import copy
import gc
import re
import threading
import weakref
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastbert
from fastbert.families import _inputs
from fastbert.inference import graphs as graphs_module
from fastbert.inference.graphs import Graphs, Tier, tier_of
from fastbert.kernels import _launch
from fastbert.warmup import outermost
from tests.checkpoints import TEXTS, tiny_checkpoint
from tests.models import config_of
from tests.optional import given, needs, settings, st
from tests.tape import OnACpu

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = ("BertModel", "BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM")
OTHERS = ("BertForQuestionAnswering", "RobertaForSequenceClassification", "DistilBertModel", "AlbertForMaskedLM")
PADDING = 1


def make(kind: str = "BertModel", device: str = "cpu", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(fastbert, kind)(config_of(kind, num_hidden_layers=2, pad_token_id=PADDING, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(device)


def on_a_cpu(model: nn.Module, most: int = 32, max_tokens: int = 16384) -> Graphs:
    return Graphs(outermost(model), most, max_tokens, OnACpu())


def packed(lengths: list[int], device: str = "cpu", types: bool = False) -> dict[str, Any]:
    T = sum(lengths)
    ids = torch.randint(3, 100, (1, T))
    batch: dict[str, Any] = {
        "input_ids": ids.to(device),
        "cu_seq_lens_q": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        "max_length_q": max(lengths),
    }
    return batch | ({"token_type_ids": (ids % 2).to(device)} if types else {})


def padded(lengths: list[int]) -> dict[str, Any]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(3, 100, mask.shape).where(mask, PADDING), "attention_mask": mask.long()}


def plainly(model: nn.Module, graphs: Graphs, batch: dict[str, Any]) -> Any:
    graphs.enabled = False
    try:
        return model(**batch)
    finally:
        graphs.enabled = True


def assert_same(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert type(actual) is type(expected)
    assert list(actual.keys()) == list(expected.keys())
    for name in expected:
        pairs = [(actual[name], expected[name])]
        if isinstance(expected[name], tuple):
            pairs = list(zip(actual[name], expected[name], strict=True))
        for a, e in pairs:
            assert a.shape == e.shape, name
            assert a.dtype == e.dtype, name
            assert a.is_contiguous() == e.is_contiguous(), name
            torch.testing.assert_close(a, e, atol=tolerance, rtol=0, msg=name)


@pytest.fixture
def model() -> nn.Module:
    return make()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


lengths_of_a_batch = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@given(tokens=st.integers(1, 40_000), sequences=st.integers(1, 2000), longest=st.integers(1, 512), limit=st.just(512))
@settings(deadline=None)
def test_a_tier_holds_its_batch(tokens: int, sequences: int, longest: int, limit: int) -> None:
    tier = tier_of(tokens, sequences, longest, limit)
    assert tier.tokens >= tokens
    assert tier.tokens % 16 == 0
    assert tier.tokens - tokens < max(16, tokens / 8)
    assert longest <= tier.longest <= limit
    more = -(-(tier.tokens - tokens) // tier.longest)
    assert tier.sequences >= max(2, sequences + more)
    assert tier_of(tier.tokens, sequences, tier.longest, limit)[::2] == tier[::2]


def test_there_are_few_tiers() -> None:
    assert len({tier_of(tokens, 1, 512, 512).tokens for tokens in range(1, 16385)}) <= 90
    assert tier_of(1, 1, 1, 512) == Tier(16, 2, 16)
    assert tier_of(100, 3, 70, 100) == Tier(112, 4, 100)


@needs("hypothesis")
@pytest.mark.parametrize("kind", HEADS)
def test_any_batches_give_what_a_plain_call_gives(kind: str) -> None:
    model = make(kind)
    graphs = on_a_cpu(model)

    @given(batches=st.lists(st.tuples(lengths_of_a_batch, st.booleans(), st.booleans()), min_size=1, max_size=4))
    @settings(max_examples=15, deadline=None)
    def check(batches: list[tuple[list[int], bool, bool]]) -> None:
        calls = [padded(lengths) if pad else packed(lengths, types=types) for lengths, pad, types in batches]
        replays = graphs.replays
        _, actual = ([model(**call) for call in calls] for _ in range(2))
        assert graphs.replays == replays + 2 * len(calls)
        for call, output in zip(calls, actual, strict=True):  # all of them, after the last replay
            assert_same(output, plainly(model, graphs, call))

    check()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_heads_and_families(kind: str) -> None:
    model = make(kind)
    graphs = on_a_cpu(model)
    for lengths in ([5, 17, 1], [9, 30, 2], [40]):
        for call in (packed(lengths), padded(lengths)):
            assert_same(model(**call), plainly(model, graphs, call))
    assert graphs.replays == 6


def test_masked_tokens_that_are_no_padding_go_past_them(model: nn.Module) -> None:
    """Their hidden states are read, and graphs have none; of the next batch they replay."""
    graphs, call = on_a_cpu(model), padded([5, 9])
    words = call | {"input_ids": torch.randint(3, 100, (2, 9))}
    for inputs, replays in ((call, 1), (words, 1), (call, 2)):
        output = model(**inputs)
        assert graphs.replays == replays, graphs
        assert_same(output, plainly(model, graphs, inputs))
        assert (output.last_hidden_state[0, 5:] == 0).all() == (inputs is call)
    assert fastbert.report(model).computed.total() == 2


def test_a_graph_serves_all_batches_of_its_tier(model: nn.Module) -> None:
    graphs = on_a_cpu(model)
    for lengths in ([20, 12, 5], [17, 3, 13], [32, 3]):
        call = packed(lengths)
        assert_same(model(**call), plainly(model, graphs, call))
    assert (graphs.captures, graphs.replays) == (1, 3)
    model(**packed([33, 1]))  # a longer one
    model(**packed([20, 12, 5], types=True))
    assert graphs.captures == 3


def test_what_fills_a_batch_up_is_in_sequences_of_its_own(model: nn.Module) -> None:
    """None is longer than the tier's longest, so that positions exist, and none has tokens of the batch."""
    graphs = on_a_cpu(model)
    model(**packed([16] * 130 + [1]))
    (captured,) = graphs._captured.values()
    bounds = captured._cu_seqlens.tolist()
    assert bounds[131] == 16 * 130 + 1 < captured._tier.tokens - 16
    assert bounds[-1] == captured._tier.tokens
    assert bounds == sorted(bounds)
    assert max(b - a for a, b in pairwise(bounds)) <= 16


def test_options_of_a_call(model: nn.Module) -> None:
    graphs = on_a_cpu(model)
    for options in ({"output_hidden_states": True}, {"return_dict": False}, {"output_hidden_states": 1}, {}):
        call = packed([7, 12]) | options
        actual, expected = model(**call), plainly(model, graphs, call)
        if options.get("return_dict") is False:
            assert type(actual) is tuple
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
        elif options.get("output_hidden_states") != 1:
            assert_same(actual, expected)
        else:
            assert [t is None for t in actual.hidden_states] == [t is None for t in expected.hidden_states]
    model.config.output_hidden_states = True
    call = packed([7, 12])
    assert_same(model(**call), plainly(model, graphs, call))
    assert graphs.replays == 5
    positions = torch.cat([torch.arange(7).flip(0), torch.arange(12)])[None]
    assert_same(model(**call, position_ids=positions), plainly(model, graphs, call | {"position_ids": positions}))
    assert graphs.replays == 6


def test_nothing_is_read_from_the_host(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the checks of values that a CPU makes and a GPU does not."""
    gpu = OnACpu()
    for kind in HEADS:
        model = make(kind)
        Graphs(outermost(model), 9, 99, gpu)
        monkeypatch.setattr(_inputs, "_check_values", lambda *_: False)
        monkeypatch.setattr("fastbert.packing.check_cu_seqlens", lambda *_: None)
        model(**packed([5, 9]))
    assert len(gpu.tapes) == len(HEADS)
    assert [tape.reads() for tape in gpu.tapes] == [[]] * len(HEADS)


PLAINLY = {
    "gradients are enabled": lambda model, call: torch.enable_grad()(model)(**call),
    "training mode": lambda model, call: model.train()(**call),
    "the argument inputs_embeds": lambda model, call: model(
        inputs_embeds=model.get_input_embeddings()(call.pop("input_ids")), **call
    ),
    "output_attentions": lambda model, call: model(input_ids=call["input_ids"], output_attentions=True),
    "more than 64 tokens": lambda model, call: model(**packed([40, 30])),
    "kernels are being compiled ahead": lambda model, call: _compiling(model, call),
}


def _compiling(model: nn.Module, call: dict[str, Any]) -> None:
    with _launch.only_compiling():
        model(**call)


@pytest.mark.parametrize("reason", PLAINLY)
def test_what_runs_plainly(reason: str, model: nn.Module) -> None:
    graphs = on_a_cpu(model, max_tokens=64)
    PLAINLY[reason](model, packed([5, 9]))
    assert (graphs.captures, dict(graphs.plain)) == (0, {reason: 1})
    assert reason in str(graphs)


def test_a_users_mistake_raises_what_it_raises_without(model: nn.Module) -> None:
    graphs = on_a_cpu(model)
    call = packed([5, 9])
    for change in (
        {"cu_seq_lens_q": call["cu_seq_lens_q"].long()},
        {"input_ids": call["input_ids"][0]},
        {"input_ids": call["input_ids"] + 100},
        {"token_type_ids": call["input_ids"][:, :3]},
        {"attention_mask": torch.ones(1, 14)},
        {"input_ids": None},
    ):
        with pytest.raises(ValueError, match=" ") as expected:
            plainly(model, graphs, call | change)
        with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
            model(**call | change)
    assert_same(model(**call), plainly(model, graphs, call))
    assert graphs.replays == 1


CHANGES = {
    "another weight": lambda model: setattr(
        model.encoder.layer[0].output.dense, "weight", nn.Parameter(torch.zeros(48, 96))
    ),
    "in place": lambda model: model.encoder.layer[0].output.dense.weight.zero_(),
    "data": lambda model: setattr(model.encoder.layer[1].output.dense.weight, "data", torch.zeros(48, 96)),
    "state dict": lambda model: model.load_state_dict({k: 0 * v for k, v in model.state_dict().items()}),
    "dtype": lambda model: model.double(),
    "eps": lambda model: setattr(model.encoder.layer[0].output.LayerNorm, "eps", 3.0),
    "a layer": lambda model: model.encoder.layer.__delitem__(0),
    "the pooler": lambda model: setattr(model.pooler, "dense", nn.Linear(48, 48).eval()),
    "a hook": lambda model: model.encoder.layer[0].register_forward_hook(lambda m, args, out: 2 * out),
    "a forward": lambda model: setattr(model.pooler, "forward", lambda hidden: 7 * hidden[:, 0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_gets_other_graphs(change: str, model: nn.Module) -> None:
    graphs, call = on_a_cpu(model), packed([5, 9])
    before = model(**call)
    (captured,) = map(weakref.ref, graphs._captured.values())
    CHANGES[change](model)
    call_after = padded([9, 9]) if change in ("a hook", "a forward") else call
    after = model(**call_after)
    assert captured() is None
    assert_same(after, plainly(model, graphs, call_after), 1e-5)
    if change in ("a hook", "a forward"):
        assert graphs.replays == 1
    else:
        assert (graphs.captures, graphs.replays) == (2, 2)
        assert not torch.equal(before.last_hidden_state.double(), after.last_hidden_state.double()) or change == (
            "the pooler"
        )


def test_a_part_of_a_head_that_is_transformers_own() -> None:
    model = make("BertForSequenceClassification")
    graphs, call = on_a_cpu(model), packed([5, 9])
    model(**call)
    model.classifier = nn.Linear(48, 3).eval()
    assert_same(model(**call), plainly(model, graphs, call))
    model.classifier = nn.Sequential(nn.Linear(48, 3), nn.ReLU()).eval()
    model(**call)
    model.classifier[1] = nn.Tanh().eval()
    assert_same(model(**call), plainly(model, graphs, call))
    assert (graphs.captures, graphs.replays) == (4, 4)
    model.classifier.register_forward_hook(lambda m, args, out: 2 * out)
    assert_same(model(**call), plainly(model, graphs, call))
    assert graphs.replays == 4
    assert graphs.plain["a module inside of the model is hooked"] == 1


def test_hooks_of_the_model_itself_run(model: nn.Module) -> None:
    graphs, seen = on_a_cpu(model), []
    model.register_forward_hook(lambda *_: seen.append(1))
    model(**packed([5, 9]))
    assert (len(seen), graphs.replays) == (1, 1)


def test_autocast_has_graphs_of_its_own(model: nn.Module) -> None:
    graphs, call = on_a_cpu(model), packed([5, 9])
    plain = model(**call)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert_same(model(**call), plainly(model, graphs, call), 0.05)
    assert_same(model(**call), plain)
    assert (graphs.captures, graphs.replays) == (3, 4)


def test_only_so_many_are_kept(model: nn.Module) -> None:
    graphs = on_a_cpu(model, most=2)
    for lengths in ([5], [40], [5], [60, 60], [5], [40]):
        call = packed(lengths)
        assert_same(model(**call), plainly(model, graphs, call))
    assert len(graphs._captured) == 2
    assert graphs.captures == 4  # [40] twice, for it was not used for longest
    with pytest.raises(ValueError, match="most and max_tokens must be at least 1"):
        fastbert.graphs(model, most=0)


def test_a_capture_that_fails_is_not_tried_again(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    gpu = OnACpu()
    graphs, call = Graphs(outermost(model), 9, 99, gpu), packed([5, 9])
    gpu.fails = RuntimeError("operation not permitted when stream is capturing\nand more")
    expected = plainly(model, graphs, call)
    for _ in range(2):
        assert_same(model(**call), expected)
    assert caplog.text.count("operation not permitted") == 1
    assert (graphs.replays, graphs.plain.total()) == (0, 3)
    gpu.fails = None
    model(**call)
    assert graphs.replays == 0
    model(**packed([40]))
    assert graphs.replays == 1


def test_switches(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    call = packed([5, 9])
    graphs = on_a_cpu(model)
    graphs.enabled = False
    model(**call)
    assert graphs.captures == 0
    monkeypatch.setenv("FASTBERT_GRAPHS", "0")
    graphs = on_a_cpu(model)
    model(**call)
    assert (graphs.captures, dict(graphs.plain)) == (0, {"they are switched off": 1})
    monkeypatch.delenv("FASTBERT_GRAPHS")
    graphs = on_a_cpu(model)
    model(**call)
    graphs.remove()
    model(**call)
    assert graphs.replays == 1
    assert not graphs._captured


def test_on_a_cpu_nothing_changes(model: nn.Module) -> None:
    graphs, call = fastbert.graphs(model), packed([5, 9])
    assert fastbert.report(model).packed_calls == 0
    model(**call)
    assert dict(graphs.plain) == {"the model is on cpu": 1}
    with pytest.raises(ValueError, match="is not patched"):
        fastbert.graphs(nn.Linear(2, 2))


def test_calls_are_counted_as_packed(model: nn.Module) -> None:
    on_a_cpu(model)
    for _ in range(3):
        model(**packed([5, 9]))
    assert fastbert.report(model).packed_calls == 3


def test_copies_and_unpatched_models_have_none(model: nn.Module) -> None:
    graphs, call = on_a_cpu(model), packed([5, 9])
    expected = model(**call)
    assert_same(copy.deepcopy(model)(**call), expected)
    assert graphs.replays == 1
    fastbert.unpatch(model)
    model(input_ids=call["input_ids"])
    assert graphs.replays == 1


def test_model_and_graphs_go_together() -> None:
    model = make()
    graphs = on_a_cpu(model)
    model(**packed([5]))
    assert graphs.replays == 1
    weak = weakref.ref(model)
    del model, graphs
    gc.collect()
    assert weak() is None


def test_warm_up_captures(model: nn.Module) -> None:
    graphs = on_a_cpu(model)
    graphs.warm_up([[5, 9], [60] * 3])
    captures = graphs.captures
    model(**packed([12, 2]))
    model(**packed([58, 60, 60]))
    assert captures == graphs.captures == 2
    with pytest.raises(ValueError, match=r"max_length must be in \[1, 64\]"):
        graphs.warm_up([[65]])


def test_threads_take_turns(model: nn.Module) -> None:
    graphs = on_a_cpu(model)
    calls = [packed([n, 20 - n]) for n in (1, 2, 3, 17, 18, 19)]
    expected = [plainly(model, graphs, call) for call in calls]
    outputs: dict[int, Any] = {}

    def run(i: int) -> None:
        with torch.inference_mode():
            for _ in range(3):
                outputs[i] = model(**calls[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, e in enumerate(expected):
        assert_same(outputs[i], e)
    assert graphs.captures == 1


def test_an_engine_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tiny_checkpoint(tmp_path)
    expected = fastbert.Embedder.from_pretrained(name).encode(TEXTS)
    monkeypatch.setattr(graphs_module, "Cuda", OnACpu)
    engine = fastbert.Embedder.from_pretrained(name, graphs=True, batch_tokens=12)
    np.testing.assert_allclose(engine.encode(TEXTS), expected, atol=2e-5)
    assert engine.graphs is not None
    assert engine.graphs.replays > 1
    assert not engine.graphs.plain


def test_inside_of_another_model(model: nn.Module) -> None:
    """What a SentenceTransformer does: a patched model is a part of another module."""
    whole = nn.Sequential(model)
    graphs, call = on_a_cpu(whole), padded([5, 9])
    whole[0](**call)
    assert graphs.replays == 1
