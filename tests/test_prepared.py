"""Layers in one call of C++: what they compute, in every precision.

The sum of embeddings in front of them: test_prepared_embeddings.py. That they are never stale: test_prepared_stale.py.

Dimension key:  T packed tokens   N features
"""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastbert
from fastbert.packing import Packing
from fastbert.prepared import PRECISIONS, Parts, Prepared, why_no_precision
from tests.families import BASES
from tests.models import batch, config_of, head_of, mask_named
from tests.optional import given, settings, st
from tests.prepared import HERE, NORM_FIRST, TOLERANCE, at_once, both, copy_of, hidden, layer_of, needs_fp32


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


@needs_fp32
@pytest.mark.parametrize("name", BASES)
def test_every_family(name: str) -> None:
    stock, fast = both(name)
    torch.testing.assert_close(hidden(fast, name), hidden(stock, name), atol=1e-5, rtol=1e-5)
    assert copy_of(fast).layers.precision == "fp32"
    assert "inference: all layers in one call, fp32" in str(fastbert.report(fast))


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
