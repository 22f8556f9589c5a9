"""What only a GPU can show. The operators' own tests run there too: `pytest -m gpu`."""

import copy

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert import functional, reference
from fastbert.kernels.layer_norm import layer_norm_fwd
from tests.models import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _packed(seqlens: list[int]) -> dict[str, Tensor]:
    T = sum(seqlens)
    return {
        "input_ids": torch.randint(1, 100, (1, T), device="cuda"),
        "cu_seq_lens_q": torch.tensor([0, *torch.tensor(seqlens).cumsum(0).tolist()], dtype=torch.int32, device="cuda"),
        "max_length_q": max(seqlens),
    }


def _model(dtype: torch.dtype, dropout_p: float = 0.1) -> torch.nn.Module:
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    config = tiny_config(hidden_dropout_prob=dropout_p, attention_probs_dropout_prob=dropout_p, **sizes)
    return fastbert.BertModel(config, add_pooling_layer=False).to("cuda", dtype).train()


def _step(model: torch.nn.Module, inputs: dict[str, Tensor], static: bool = False) -> None:
    model.zero_grad(set_to_none=not static)
    model(**inputs).last_hidden_state.float().square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_two_training_steps_are_bitwise_equal(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        model, inputs = _model(dtype), _packed([64, 7, 33])
        gradients = []
        for _ in range(2):
            torch.manual_seed(1)
            _step(model, inputs)
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_training_step_in_a_cuda_graph() -> None:
    """Captured once, it gives the gradients of an eager step; with dropout every replay draws new masks."""
    model, inputs = _model(torch.bfloat16, dropout_p=0.0), _packed([64, 7, 33])
    other = copy.deepcopy(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _step(model, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _step(model, inputs, static=True)
    inputs["input_ids"].copy_(torch.randint(1, 100, inputs["input_ids"].shape, device="cuda"))
    graph.replay()
    _step(other, inputs)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification", "BertForMaskedLM"])
def test_inference_in_cuda_graphs(kind: str, dtype: torch.dtype) -> None:
    """Any batches give what a plain call gives, by a few graphs, of which each serves a tier."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    model = getattr(fastbert, kind)(tiny_config(**sizes)).to("cuda", dtype).eval()
    graphs = fastbert.graphs(model)
    calls = [_packed(lengths) for lengths in ([5, 9], [7, 3, 2], [60, 64, 1], [9], [64] * 40, [5, 9])]
    calls += [{"input_ids": torch.randint(1, 100, (3, 20), device="cuda")}]
    mask = torch.arange(20, device="cuda").expand(3, 20).lt(11).long()
    calls += [{"input_ids": calls[-1]["input_ids"] * mask, "attention_mask": mask}]
    with torch.inference_mode():
        outputs = [model(**call) for call in calls]
        graphs.enabled = False
        expected = [model(**call) for call in calls]
    assert graphs.replays == len(calls), graphs
    assert graphs.captures < len(calls)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for output, plain in zip(outputs, expected, strict=True):
        for name in plain:
            torch.testing.assert_close(output[name], plain[name], atol=tolerance, rtol=tolerance)


def test_int8_in_cuda_graphs() -> None:
    """Its weights stay where a graph reads them, also when a training step gives back the model's copy of them."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    stock = fastbert.BertModel(tiny_config(**sizes)).to("cuda", torch.bfloat16).eval()
    model = fastbert.patch(stock, inference_dtype="int8")
    graphs, call = fastbert.graphs(model), _packed([5, 9, 40])
    with torch.inference_mode():
        graphs.enabled = False
        model(**call)  # the copy is made on this stream, where other tensors would take its place
        graphs.enabled = True
        output = model(**call).last_hidden_state
    model.train()(**call).last_hidden_state.sum().backward()
    model.eval()
    filler = [torch.randint(-128, 127, (128, 256), dtype=torch.int8, device="cuda") for _ in range(100)]
    with torch.inference_mode():
        again = model(**call).last_hidden_state
        assert graphs.replays == 2, graphs
        graphs.enabled = False
        plain = model(**call).last_hidden_state
    assert torch.equal(output, again)
    torch.testing.assert_close(output, plain, atol=5e-2, rtol=5e-2)
    assert len(filler) == 100


def test_a_replay_waits_for_nothing() -> None:
    """It reads nothing back, on any stream, and streams that follow one another do not disturb each other."""
    model = fastbert.BertModel(tiny_config()).cuda().eval()
    graphs, calls = fastbert.graphs(model), [_packed([5, 9]), _packed([9, 5])]
    with torch.inference_mode():
        expected = [model(**call).last_hidden_state for call in calls]
        torch.cuda.synchronize()
        streams, outputs = [torch.cuda.Stream() for _ in range(4)], []
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(40):
                with torch.cuda.stream(streams[i % 4]):
                    outputs.append(model(**calls[i % 2]).last_hidden_state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert (graphs.captures, graphs.replays) == (1, 42)
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, expected[i % 2])


def test_graphs_under_autocast_and_after_a_change() -> None:
    model, call = fastbert.BertModel(tiny_config()).cuda().eval(), _packed([5, 9])
    graphs = fastbert.graphs(model)
    with torch.inference_mode():
        wide = model(**call).last_hidden_state
        with torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(model(**call).last_hidden_state, wide, atol=5e-2, rtol=5e-2)
            torch.testing.assert_close(model(**call).last_hidden_state, wide, atol=5e-2, rtol=5e-2)
        torch.testing.assert_close(model(**call).last_hidden_state, wide)
        assert graphs.captures == 2
        model.load_state_dict({name: 0 * t for name, t in model.state_dict().items()})
        assert model(**call).last_hidden_state.abs().max() == 0
        model.half()
        assert model(**call).last_hidden_state.dtype == torch.float16
    assert (graphs.captures, len(graphs._captured)) == (4, 1)


def test_graphs_are_few_and_their_memory_is_given_back() -> None:
    model = fastbert.BertModel(tiny_config(max_position_embeddings=512)).cuda().eval()
    graphs = fastbert.graphs(model, most=4)
    with torch.inference_mode():
        model(**_packed([64] * 64))
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        for tokens in [*range(16, 400, 48)] * 2:
            model(**_packed([tokens]))
    assert len(graphs._captured) == 4
    graphs.remove()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_dropout_in_a_cuda_graph_draws_new_masks() -> None:
    x, weight = torch.randn(64, 128, device="cuda"), torch.ones(128, device="cuda")

    def run() -> Tensor:
        return functional.layer_norm(x, weight, weight, dropout_p=0.5)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


def test_the_same_masks_as_on_a_cpu() -> None:
    x, weight, seed = torch.randn(9, 256), torch.ones(256), torch.tensor(-5)
    on_cpu = functional.layer_norm(x, weight, weight, residual=x, dropout_p=0.3, seed=seed, stream=2)
    on_gpu = functional.layer_norm(
        x.cuda(), weight.cuda(), weight.cuda(), residual=x.cuda(), dropout_p=0.3, seed=seed.cuda(), stream=2
    )
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)


def test_more_than_two_to_the_31_elements() -> None:
    M, N = 2**21 + 3, 1024
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    x = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(N, device="cuda", dtype=torch.bfloat16)
    y, mean, rstd = layer_norm_fwd(x, None, None, weight, weight, 1e-12, 0.0, None, 0)
    last = slice(M - 5, M)
    expected = reference.layer_norm(x[last], None, None, weight, weight, 1e-12, 0.0, None, 0)
    for actual, e in zip((y[last], mean[last], rstd[last]), expected, strict=True):
        torch.testing.assert_close(actual, e, atol=2e-2, rtol=2e-2)


def test_a_second_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight = torch.randn(4, 64, device="cuda:1"), torch.ones(64, device="cuda:1")
    with torch.cuda.device(0):
        y = functional.layer_norm(x, weight, weight)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,), weight, weight, 1e-12))
