"""Layers in one call of C++: what they compute, in every precision, and that they are never stale.

The sum of embeddings in front of them: test_prepared_embeddings.py.

Dimension key:  T packed tokens   N features
"""

import copy
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert.families import _base
from fastbert.packing import Packing
from fastbert.prepared import PRECISIONS, Parts, Prepared, why_no_precision
from tests.families import BASES
from tests.models import batch, config_of, head_of, mask_named
from tests.optional import given, settings, st

HERE = [precision for precision in PRECISIONS if why_no_precision(precision) is None]
needs_fp32 = pytest.mark.skipif("fp32" not in HERE, reason=str(why_no_precision("fp32")))
# Of LayerNorm's outputs, which are about 1, and of sums that two layers begin: two layers' worth of rounding.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.15}


def layer_of(
    N: int, heads: int, head_dim: int, inner: int, form: str, bias: bool, norm_first: bool = False
) -> tuple[Parts, nn.ModuleList]:
    context = heads * head_dim
    sizes = [(N, context)] * 3 + [(context, N), (N, inner), (inner, N)]
    linears = [nn.Linear(*size, bias=bias) for size in sizes]
    norms = [nn.LayerNorm(N, eps=1e-6), nn.LayerNorm(N, eps=1e-6)]
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.1)
        nn.init.normal_(norm.bias, 0, 0.1)
    q, k, v, o, up, down = linears
    parts = Parts(q, k, v, o, norms[0], up, nn.GELU(form), down, norms[1], head_dim, head_dim**-0.5, norm_first)
    return parts, nn.ModuleList([*linears, *norms])


def exact(parts: Parts, hidden_TN: Tensor, lengths: list[int]) -> Tensor:
    """A layer in the dtype of its weights, sequence by sequence."""
    split = (parts.query.out_features // parts.head_dim, parts.head_dim)
    done = []
    for x in hidden_TN.split(lengths):
        begin = parts.attention_norm(x) if parts.norm_first else x
        q, k, v = (of(begin).unflatten(-1, split).transpose(0, 1) for of in (parts.query, parts.key, parts.value))
        p = (q @ k.mT * parts.scale).softmax(-1)
        x = parts.attention_out((p @ v).transpose(0, 1).flatten(1)) + x
        x = x if parts.norm_first else parts.attention_norm(x)
        inside = parts.inner(parts.norm(x) if parts.norm_first else x)
        x = parts.out(parts.activation(inside)) + x
        done.append(x if parts.norm_first else parts.norm(x))
    return torch.cat(done)


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 8, 16, 20, 32, 33, 64, 128, 130]),
    N=st.sampled_from([1, 7, 16, 48, 60, 64, 65, 130]),
    inner=st.integers(1, 150),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    long=st.sampled_from([0, 97, 257]),
    form=st.sampled_from(["none", "tanh"]),
    bias=st.booleans(),
    norm_first=st.booleans(),
    ends=st.booleans(),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_values(
    precision: str,
    heads: int,
    head_dim: int,
    N: int,
    inner: int,
    lengths: list[int],
    long: int,
    form: str,
    bias: bool,
    norm_first: bool,
    ends: bool,
    threads: int,
    seed: int,
) -> None:
    if precision not in HERE:
        pytest.skip(str(why_no_precision(precision)))
    torch.manual_seed(seed)
    parts, modules = layer_of(N, heads, head_dim, inner, form, bias, norm_first)
    end = nn.LayerNorm(N, eps=0.01) if ends else None
    lengths = [*lengths, long]
    hidden_TN, packing = torch.randn(sum(lengths), N), Packing.from_lengths(lengths)
    layers = Prepared([parts, parts], precision, end)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            actual, firsts = (layers.run(hidden_TN, packing, first_only=first) for first in (False, True))
            modules.double()
            expected = exact(parts, exact(parts, hidden_TN.double(), lengths), lengths)
            expected = expected if end is None else end.double()(expected)
            # LayerNorm of a feature or two is steep: what it makes of a rounding has no bound.
            if N > 4:
                torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[precision], rtol=0)
    finally:
        torch.set_num_threads(before)
    for (start, end), first in zip(pairwise(packing.cu_seqlens.tolist()), firsts, strict=True):
        assert torch.equal(first, actual[start] if end > start else torch.zeros(N))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("precision", HERE)
def test_neither_neighbours_nor_threads_change_a_bit(precision: str, norm_first: bool) -> None:
    parts, _ = layer_of(48, 3, 16, 80, "none", True, norm_first)
    layers, lengths = Prepared([parts, parts], precision, nn.LayerNorm(48)), [5, 1, 130, 17, 33]
    hidden_TN, before = torch.randn(sum(lengths), 48), torch.get_num_threads()
    expected = layers.run(hidden_TN, Packing.from_lengths(lengths))
    for x, y in zip(hidden_TN.split(lengths), expected.split(lengths), strict=True):
        assert torch.equal(layers.run(x, Packing.from_lengths([len(x)])), y)
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(layers.run(hidden_TN, Packing.from_lengths(lengths)), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("precision", HERE)
def test_what_is_not_finite_stays_in_its_sequence(precision: str, norm_first: bool) -> None:
    parts, _ = layer_of(48, 3, 16, 80, "none", True, norm_first)
    layers, lengths = Prepared([parts], precision), [5, 40, 17]
    hidden_TN = torch.randn(sum(lengths), 48)
    clean = layers.run(hidden_TN, Packing.from_lengths(lengths)).split(lengths)
    hidden_TN[7] = torch.nan
    spoilt = layers.run(hidden_TN, Packing.from_lengths(lengths)).split(lengths)
    assert torch.equal(spoilt[0], clean[0])
    assert torch.equal(spoilt[2], clean[2])
    assert spoilt[1].isnan().all()


@pytest.mark.parametrize("precision", HERE)
def test_a_weight_that_is_not_finite_is_no_number(precision: str) -> None:
    parts, _ = layer_of(48, 3, 16, 80, "none", True)
    with torch.no_grad():
        parts.out.weight[7, 11] = torch.nan
    assert Prepared([parts], precision).run(torch.randn(5, 48), Packing.from_lengths([5])).isnan().all()


def both(name: str = "BertModel", **options: Any) -> tuple[Any, Any]:
    stock = getattr(transformers, name)(config_of(name)).eval()
    with torch.no_grad():
        for weight in stock.parameters():  # biases too
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return stock, fastbert.patch(copy.deepcopy(stock), **options)


def copy_of(model: nn.Module) -> Any:
    return _base.state(model).copy


def hidden(model: Any, name: str = "BertModel") -> Tensor:
    """Of the same batch each time."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = batch(name, mask_named("right"))
        return model(**inputs)[0][inputs["attention_mask"].bool()]


NORM_FIRST = ["RobertaPreLayerNormModel", "XLMRobertaXLModel"]


@needs_fp32
@pytest.mark.parametrize("name", BASES)
def test_every_family(name: str) -> None:
    stock, fast = both(name)
    torch.testing.assert_close(hidden(fast, name), hidden(stock, name), atol=1e-5, rtol=1e-5)
    assert copy_of(fast).layers.precision == "fp32"
    assert "inference on a CPU: all layers in one call, fp32" in str(fastbert.report(fast))


@pytest.mark.skipif("bf16" not in HERE, reason=str(why_no_precision("bf16")))
@pytest.mark.parametrize("name", BASES)
def test_every_family_in_bfloat16(name: str) -> None:
    stock, fast = both(name)
    actual, expected = hidden(fast.bfloat16(), name), hidden(stock, name)
    assert actual.dtype == torch.bfloat16
    assert copy_of(fast).layers.precision == "bf16"
    assert torch.nn.functional.cosine_similarity(actual.float(), expected).min() > 0.999


@needs_fp32
def test_a_head_gets_each_first_token() -> None:
    name = "RobertaForSequenceClassification"
    stock, fast = both(name)
    inputs = batch(name, mask_named("right"))
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert head_of(name) == "ForSequenceClassification"
    assert copy_of(fast.roberta).layers is not None


def _load(model: Any) -> None:
    model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()})


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3].zero_()


def _other_parameter(model: Any) -> None:
    model.encoder.layer[0].attention.self.value.bias = nn.Parameter(torch.randn(48))


def _other_tensor(model: Any) -> None:
    model.encoder.layer[0].intermediate.dense.weight.data = torch.randn(96, 48)


def _other_module(model: Any) -> None:
    model.encoder.layer[2].intermediate.dense = nn.Linear(48, 96)


def _step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(**batch("BertModel", mask_named("right")))[0][:, 0, :5].sum().backward()
    optimizer.step()


def _hook(model: Any) -> None:
    model.encoder.layer[1].output.LayerNorm.register_forward_hook(lambda module, args, output: output * 2)


def _scaling(model: Any) -> None:
    model.encoder.layer[1].attention.self.scaling = 0.05


def _eps(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.output.LayerNorm.eps = layer.output.LayerNorm.eps = 0.5


def _no_bias(model: Any) -> None:
    model.encoder.layer[0].output.dense.bias = None


def _activation(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()


def _data_in_place(model: Any) -> None:  # as PEFT merges, and as averages of weights are swapped in
    for weight in model.encoder.layer[1].parameters():
        weight.data.mul_(1.5)


def _twice(model: Any) -> None:
    for _ in range(2):
        model.encoder.layer[0].intermediate.dense.weight = nn.Parameter(torch.randn(96, 48))


def _data_twice(model: Any) -> None:
    for _ in range(2):
        model.encoder.layer[0].intermediate.dense.weight.data = torch.randn(96, 48)


def _table_in_place(model: Any) -> None:
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(2)


def _table_data(model: Any) -> None:
    model.embeddings.position_embeddings.weight.data = torch.randn_like(model.embeddings.position_embeddings.weight)


def _other_table(model: Any) -> None:
    model.embeddings.token_type_embeddings = nn.Embedding(2, 48)


def _embeddings_norm(model: Any) -> None:
    model.embeddings.LayerNorm.weight.data[5:].mul_(2)


def _embeddings_eps(model: Any) -> None:
    model.embeddings.LayerNorm.eps = 0.5


def _half(model: Any) -> None:
    model.bfloat16()


def _fewer_layers(model: Any) -> None:
    del model.encoder.layer[1]


CHANGES = [_load, _in_place, _other_parameter, _other_tensor, _other_module, _step, _hook, _scaling, _eps, _no_bias]
CHANGES += [_activation, _half, _fewer_layers, _data_in_place, _twice, _data_twice]
CHANGES += [_table_in_place, _table_data, _other_table, _embeddings_norm, _embeddings_eps]


@needs_fp32
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_it_is_never_stale(change: Any) -> None:
    torch.manual_seed(3)
    stock, fast = both()
    before = hidden(fast)
    assert copy_of(fast).layers is not None
    for model in (stock, fast):
        torch.manual_seed(4)
        change(model)
    expected = hidden(stock)
    tolerance = 0.05 if expected.dtype == torch.bfloat16 else 1e-5
    assert (expected - before).abs().max() > 10 * tolerance or change is _half
    for _ in range(3):  # the first call after a change finds it, the next makes another copy
        torch.testing.assert_close(hidden(fast), expected, atol=tolerance, rtol=tolerance)


def norms_of(model: Any) -> list[nn.LayerNorm]:
    """Of a model that normalises first: the last one, and a layer's two."""
    if hasattr(model, "LayerNorm"):
        first, second = model.encoder.layer[1].attention.LayerNorm, model.encoder.layer[1].intermediate.LayerNorm
        return [model.LayerNorm, first, second]
    layer = model.encoder.layer[1]
    return [model.encoder.LayerNorm, layer.attention.self_attn_layer_norm, layer.LayerNorm]


@needs_fp32
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("name", NORM_FIRST)
def test_the_norms_of_layers_that_normalise_first_are_never_stale(name: str, which: int) -> None:
    torch.manual_seed(3)
    stock, fast = both(name)
    before = hidden(fast, name)
    for model in (stock, fast):
        torch.manual_seed(4)
        norms_of(model)[which].weight.data = torch.randn(48)
    expected = hidden(stock, name)
    assert (expected - before).abs().max() > 1e-3
    for _ in range(3):
        torch.testing.assert_close(hidden(fast, name), expected, atol=1e-5, rtol=1e-5)
    assert copy_of(fast).layers is not None
    norms_of(fast)[which].eps = norms_of(stock)[which].eps = 0.5
    for _ in range(3):
        torch.testing.assert_close(hidden(fast, name), hidden(stock, name), atol=1e-5, rtol=1e-5)
    assert (copy_of(fast).layers is None) == (which > 0)  # a layer has one epsilon


@needs_fp32
def test_weights_that_change_all_the_time_are_not_copied_each_time() -> None:
    _, fast = both()
    hidden(fast)
    for _ in range(3):
        _in_place(fast)
        hidden(fast)
        assert copy_of(fast).layers is None
    hidden(fast)
    assert copy_of(fast).layers is not None


@needs_fp32
def test_it_is_given_back() -> None:
    _, fast = both()
    hidden(fast)
    assert copy_of(copy.deepcopy(fast)) is None
    assert copy_of(pickle.loads(pickle.dumps(fast))) is None
    fast.train()(**batch("BertModel", mask_named("right")))
    assert copy_of(fast) is None
    hidden(fast.eval())
    assert copy_of(fast) is not None
    assert copy_of(fastbert.unpatch(fast)) is None


def test_calls_that_cannot_have_it() -> None:
    inputs = batch("BertModel", mask_named("right"))
    stock, fast = both(prepare=False)
    torch.testing.assert_close(hidden(fast), hidden(stock), atol=1e-5, rtol=1e-5)
    assert copy_of(fast) is None
    assert "layer by layer: prepare=False" in str(fastbert.report(fast))
    stock, fast = both()
    fast(**inputs)  # with gradients
    with torch.no_grad():
        for asked in ({"output_hidden_states": True}, {"output_attentions": True}):
            fast(**inputs, **asked)
        fast.train()(**inputs)  # drops
        with torch.autocast("cpu", torch.bfloat16):
            fast.eval()(**inputs)
    assert copy_of(fast) is None
    with torch.inference_mode():
        made_inside = fastbert.patch(copy.deepcopy(stock).to(torch.float64).to(torch.float32))
        made_inside(**inputs)
    assert copy_of(made_inside).layers is None


def at_once(model: Any) -> Tensor | None:
    """What an engine asks for."""
    with torch.inference_mode():
        ids, bounds = torch.arange(5, 22)[None], torch.tensor([0, 7, 17], dtype=torch.int32)
        found: Tensor | None = model.encode_packed(ids, None, Packing.from_cu_seqlens(bounds, 10, 17))
        if found is not None:
            called = model(input_ids=ids, cu_seq_lens_q=bounds, max_length_q=10).last_hidden_state[0]
            torch.testing.assert_close(found, called, atol=1e-5, rtol=1e-5)
        return found


@needs_fp32
@pytest.mark.parametrize("name", BASES)
def test_what_engines_ask_for(name: str) -> None:
    assert at_once(both(name)[1]) is not None


@needs_fp32
def test_what_engines_cannot_have_at_once() -> None:
    assert at_once(both(prepare=False)[1]) is None
    causal = fastbert.BertModel(config_of("BertModel", is_decoder=True, use_cache=False)).eval()
    assert at_once(causal) is None
    _, drops = both()
    drops.encoder.layer[0].output.dropout.train()
    assert at_once(drops) is None
    assert at_once(drops.eval()) is not None
    _, own = both()
    own.embeddings.token_type_embeddings = nn.Sequential(own.embeddings.token_type_embeddings)
    assert at_once(own) is None
    _, hooked = both()
    hooked.register_forward_hook(lambda module, args, output: None)
    assert at_once(hooked) is None


@pytest.mark.parametrize("name", ["BertModel", *NORM_FIRST])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_another_precision_than_the_models(precision: str, name: str) -> None:
    if precision not in HERE:
        with pytest.raises(ValueError, match=f"inference_dtype='{precision}': the CPU has no|was not built"):
            both(name, inference_dtype=precision)
        return
    stock, fast = both(name, inference_dtype=precision)
    actual, expected = hidden(fast, name), hidden(stock, name)
    assert actual.dtype == torch.float32
    assert 1e-4 < (actual - expected).abs().max() < TOLERANCE[precision]
    assert torch.nn.functional.cosine_similarity(actual, expected).min() > 0.999
    assert f"all layers in one call, {precision}" in str(fastbert.report(fast))
    assert all(weight.dtype == torch.float32 for weight in fast.parameters())


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="inference_dtype must be 'bf16', 'int8' or None, but is 'int4'"):
        both(inference_dtype="int4")
    if "int8" in HERE:
        with pytest.raises(ValueError, match="inference_dtype needs prepare=True"):
            both(inference_dtype="int8", prepare=False)


@needs_fp32
def test_bad_calls_of_the_extension() -> None:
    from fastbert import _C

    sizes = {"hidden": 16, "heads": 2, "head_dim": 8, "inner": 8, "eps": 1e-6, "scale": 1.0, "tanh_gelu": False}
    encoder = _C.Encoder(precision="fp32", **sizes)
    ones = np.ones((3, 16), np.float32)
    for bounds, order, message in (
        ([0, 2], [], "cu_seqlens must rise from 0"),
        ([1, 3], [], "cu_seqlens must rise from 0"),
        ([0, 4, 3], [], "cu_seqlens must rise from 0"),
        ([0, 3], [0], "no such layer"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.run(ones, np.array(bounds, np.int32), order, False, 1)
    with pytest.raises(ValueError, match="hidden must be"):
        encoder.run(ones[:, :8], np.array([0, 3], np.int32), [], False, 1)
    with pytest.raises(ValueError, match="16 weights"):
        encoder.add_layer([ones])
    with pytest.raises(ValueError, match="another size"):
        encoder.add_layer([ones] * 16)
    with pytest.raises(ValueError, match="sizes must be positive"):
        _C.Encoder(precision="fp32", **(sizes | {"heads": 0}))
    with pytest.raises(ValueError, match="precision"):
        _C.Encoder(precision="fp64", **sizes)
