"""The sum of embeddings in front of layers that run in one call of C++: tables are read in place, and never outside.

Dimension key:  T packed tokens   N features
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastbert
from fastbert.packing import Packing
from fastbert.prepared import Embeddings, Prepared, why_no_precision
from tests.families import BASES
from tests.models import batch, config_of, mask_named
from tests.optional import given, settings, st
from tests.prepared import HERE, at_once, both, copy_of, hidden, layer_of

pytestmark = pytest.mark.skipif("fp32" not in HERE, reason=str(why_no_precision("fp32")))
PROJECTED = ("AlbertModel", "ElectraModel")  # whose embeddings are narrower than their layers


def tables_of(T: int, N: int, tables: int, dtype: torch.dtype, wider: int) -> list[tuple[Tensor, Tensor]]:
    """Each with its ids; the rows of the tables are apart."""
    found = []
    for rows in (50, 2, 40, 3)[:tables]:
        found.append((torch.randn(rows, N + wider).to(dtype)[:, :N], torch.randint(0, rows, (T,))))
    return found


def encoder_of(N: int) -> Any:
    from fastbert import _C

    return _C.Encoder(precision="fp32", hidden=N, heads=1, head_dim=8, inner=8, eps=1e-6, scale=1.0, tanh_gelu=False)


def without_layers(embeddings: Embeddings, N: int, T: int, threads: int = 1) -> Tensor:
    bounds = np.array([0, T], np.int32)
    out = encoder_of(N).embed_and_run(*embeddings.arrays(), bounds, [], False, threads)
    return torch.from_numpy(out)


@settings(max_examples=40, deadline=None)
@given(
    N=st.sampled_from([1, 7, 16, 31, 33, 48, 130, 768]),
    T=st.integers(0, 70),
    tables=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    wider=st.sampled_from([0, 3]),
    normalises=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_values(
    N: int, T: int, tables: int, dtype: torch.dtype, wider: int, normalises: bool, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    norm = nn.LayerNorm(N, eps=1e-3).to(dtype) if normalises else None
    if norm is not None:
        nn.init.normal_(norm.weight, 1, 0.1)
        nn.init.normal_(norm.bias, 0, 0.1)
    embeddings = Embeddings(tables_of(T, N, tables, dtype, wider), norm)
    assert embeddings.can_be_read(N)
    actual = without_layers(embeddings, N, T, threads)
    exact = torch.stack([F.embedding(ids, table.double()) for table, ids in embeddings.parts]).sum(0)
    if norm is not None:
        exact = F.layer_norm(exact, [N], norm.weight.double(), norm.bias.double(), norm.eps)
    torch.testing.assert_close(actual.double(), exact, atol=1e-5 if N > 4 else 1e-3, rtol=1e-6)


@pytest.mark.parametrize("precision", HERE)
def test_neither_neighbours_nor_threads_change_a_bit(precision: str) -> None:
    layers, lengths = Prepared([layer_of(48, 3, 16, 80, "none", True)[0]], precision), [5, 1, 130, 17, 33]
    parts, norm = tables_of(sum(lengths), 48, 3, torch.float32, 0), nn.LayerNorm(48)
    expected, before = layers.run(Embeddings(parts, norm), Packing.from_lengths(lengths)), torch.get_num_threads()
    start = 0
    for length, of_sequence in zip(lengths, expected.split(lengths), strict=True):
        own = [(table, ids[start : start + length]) for table, ids in parts]
        assert torch.equal(layers.run(Embeddings(own, norm), Packing.from_lengths([length])), of_sequence)
        start += length
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(layers.run(Embeddings(parts, norm), Packing.from_lengths(lengths)), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**63)])
@pytest.mark.parametrize("which", range(2))
def test_an_id_that_is_not_in_its_table(bad: int, which: int) -> None:
    parts = [(torch.randn(50, 16), torch.randint(0, 50, (9,))) for _ in range(2)]
    parts[which][1][8] = bad
    with pytest.raises(IndexError, match=f"an id is {bad}, but the table has 50 rows"):
        without_layers(Embeddings(parts, None), 16, 9)


def test_ids_of_a_model_that_are_not_in_its_tables() -> None:
    _, fast = both()
    hidden(fast)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="input_ids has 1000, not in"):
            fast(input_ids=torch.tensor([[5, 1000]]))
        with pytest.raises(IndexError, match="an id is 1000"):  # where ids are known to be good
            fast.encode_packed(torch.tensor([[5, 1000]]), None, Packing.from_lengths([2]))
        fast.embeddings.word_embeddings.weight.data = torch.randn(20, 48)
        with pytest.raises(ValueError, match=r"input_ids has 20, not in \[0, 20\)"):
            fast(input_ids=torch.tensor([[5, 20]]))


def test_bad_calls_of_the_extension() -> None:
    encoder, ids, bounds = encoder_of(16), np.zeros(3, np.int64), np.array([0, 3], np.int32)
    table, vector = np.ones((2, 16), np.float32), np.ones(16, np.float32)
    for parts, norm, message in (
        ([], None, "there must be a table"),
        ([(table[:, :8], ids)], None, "a table must be"),
        ([(table[0], ids)], None, "a table must be"),
        ([(table.astype(np.float64), ids)], None, "a table must be"),
        ([(np.ones((16, 2), np.float32).T, ids)], None, "side by side"),
        ([(table, ids), (table, ids[:2])], None, "an id for each token"),
        ([(table, ids[:2])], None, "cu_seqlens must rise"),
        ([(table, ids)], (vector, vector[:8], 1e-6), "a vector of another size"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.embed_and_run(parts, norm, bounds, [], False, 1)
    with pytest.raises(ValueError, match="a vector of another size"):
        encoder.set_norm(vector[:8], vector, 1e-6)


def operators(model: Any, name: str) -> set[str]:
    """What PyTorch runs in a call, once there is a copy of the layers."""
    inputs = batch(name, mask_named("full"))
    with torch.no_grad():
        model(**inputs)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            model(**inputs)
    return {event.key for event in found.key_averages()}


@pytest.mark.parametrize("name", ["BertModel", *BASES])
def test_pytorch_embeds_only_what_a_product_projects(name: str) -> None:
    found = operators(both(name)[1], name)
    assert "fastbert::layers" in found
    assert found.isdisjoint({"aten::embedding", "aten::layer_norm", "aten::native_layer_norm"}) == (
        name not in PROJECTED
    )


def test_electra_without_a_projection() -> None:
    stock = transformers.ElectraModel(config_of("ElectraModel", embedding_size=48)).eval()
    fast = fastbert.ElectraModel(stock.config).eval()
    fast.load_state_dict(stock.state_dict())
    torch.testing.assert_close(hidden(fast, "ElectraModel"), hidden(stock, "ElectraModel"), atol=1e-5, rtol=1e-5)
    assert "aten::embedding" not in operators(fast, "ElectraModel")


@pytest.mark.parametrize("name", ["BertModel", *BASES])
def test_embeddings_of_ones_own(name: str) -> None:
    stock, fast = both(name)
    inputs = batch(name, mask_named("right"))
    width = getattr(stock.config, "embedding_size", 48)
    del inputs["input_ids"]
    inputs["inputs_embeds"] = torch.randn(*inputs["attention_mask"].shape, width)
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs)[0][keep], stock(**inputs)[0][keep], atol=1e-5, rtol=1e-5)
    assert copy_of(fast).layers is not None


def test_tables_that_cannot_be_read_are_pytorchs() -> None:
    stock, fast = both()
    for model in (stock, fast):
        torch.manual_seed(4)
        model.embeddings.word_embeddings.weight = nn.Parameter(torch.randn(48, 100).T)
    torch.testing.assert_close(hidden(fast), hidden(stock), atol=1e-5, rtol=1e-5)
    assert copy_of(fast).layers is not None
    assert at_once(fast) is not None
    for parts in (
        [(torch.randn(9, 16).half(), torch.zeros(1))],
        [(torch.randn(9, 16).bfloat16(), torch.zeros(1)), (torch.randn(9, 16), torch.zeros(1))],
        [(torch.randn(9, 15), torch.zeros(1))],
        [(torch.randn(9, 16, device="meta"), torch.zeros(1))],
        [(torch.randn(9, 16).to_sparse(), torch.zeros(1))],
    ):
        assert not Embeddings(parts, None).can_be_read(16)
