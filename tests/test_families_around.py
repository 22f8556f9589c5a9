"""What is done with models of every family: copied, saved, compiled, exported, adapted, checkpointed, reported on."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert import functional
from tests.families import IN_FULL, MASKED_LM, both, dropping, packed_and_padded, without_cache
from tests.models import assert_gradients_close, assert_outputs_equal, batch, config_of, head_of, mask_named


def _tied(model: nn.Module) -> set[tuple[str, ...]]:
    """Names of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {tuple(found) for found in names.values() if len(found) > 1}


SAVED = [*MASKED_LM, *(name for name in IN_FULL if head_of(name) == "ForPreTraining"), "XLMRobertaXLForCausalLM"]


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_reloaded(name: str, tmp_path: Any) -> None:
    stock, fast = both(name)
    fast.save_pretrained(tmp_path)
    reloaded, again = (getattr(of, name).from_pretrained(tmp_path) for of in (transformers, fastbert))
    for key, value in stock.state_dict().items():
        assert torch.equal(reloaded.state_dict()[key], value)
        assert torch.equal(again.state_dict()[key], value)
    assert type(reloaded).__module__.startswith("transformers.")
    assert reloaded.config.architectures == [name]
    assert _tied(again) == _tied(reloaded) == _tied(stock)


@pytest.mark.parametrize("name", MASKED_LM)
def test_copies(name: str) -> None:
    _, fast = both(name, strict=True)
    inputs = batch(name, mask_named("right"))
    assert _tied(fast)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(other) is type(fast)
        assert torch.equal(other(**inputs).logits, fast(**inputs).logits)
        assert _tied(other) == _tied(fast)


@pytest.mark.parametrize("name", IN_FULL)
def test_patch_and_unpatch(name: str) -> None:
    stock = copy.deepcopy(both(name)[0])
    kinds, state = [type(m) for m in stock.modules()], {key: t.data_ptr() for key, t in stock.state_dict().items()}
    inputs = batch(name, mask_named("right")) | without_cache(name)
    expected = stock(**inputs)
    fastbert.patch(stock, strict=True)(**inputs)
    assert type(stock) is getattr(fastbert, name)
    assert [type(m).__name__ for m in stock.modules()] == [kind.__name__ for kind in kinds]
    assert {key: t.data_ptr() for key, t in stock.state_dict().items()} == state
    fastbert.unpatch(stock)
    assert [type(m) for m in stock.modules()] == kinds
    for key, value in stock(**inputs).items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("name", MASKED_LM)
def test_a_users_subclass(name: str) -> None:
    parent = getattr(transformers, name)
    kind = type("Mine", (parent,), {"words": lambda self: self.config.vocab_size, "__module__": __name__})
    stock = kind(both(name)[0].config).eval()
    fast = fastbert.patch(copy.deepcopy(stock), strict=True)
    assert isinstance(fast, kind)
    assert fast.words() == 100
    inputs = batch(name, mask_named("right"))
    assert_outputs_equal(fast(**inputs), stock(**inputs), inputs["attention_mask"])


class TestDropout:
    @pytest.mark.parametrize("name", MASKED_LM)
    def test_every_mask_of_a_pass_is_another(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of a layer's repetitions too. Layers that normalise first have PyTorch's dropouts between them."""
        streams: list[int] = []
        for operator in ("attention", "layer_norm", "embedding"):
            monkeypatch.setattr(functional, operator, _noting(getattr(functional, operator), streams))
        fast = fastbert.patch(getattr(transformers, name)(config_of(name, **dropping(0.3))), strict=True)
        fast.train().base_model(**_of_base(name))
        assert len(streams) == len(set(streams)) >= fast.config.num_hidden_layers

    def test_repetitions_of_a_layer_drop_other_elements(self) -> None:
        """From zeros, each repetition adds dropout(1) and normalises: with one mask for both, two values come out."""
        config = config_of("AlbertModel", num_hidden_layers=2, num_hidden_groups=1, inner_group_num=1, **dropping(0.0))
        model = fastbert.AlbertModel(config).train()
        layer = model.encoder.albert_layer_groups[0].albert_layers[0]
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            for ones in (
                layer.attention.dense.bias,
                layer.attention.LayerNorm.weight,
                layer.full_layer_layer_norm.weight,
            ):
                ones.fill_(1.0)
        layer.attention.output_dropout.p = 0.5
        states = model(torch.randint(1, 99, (1, 5)), output_hidden_states=True).hidden_states
        for token in range(5):
            values = [state[0, token].round(decimals=3).unique().numel() for state in states]
            assert values[:2] == [1, 2]
            assert values[2] > 2


def _noting(operator: Any, streams: list[int]) -> Any:
    def noting(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dropout_p", 0) > 0:
            streams.append(kwargs["stream"])
        return operator(*args, **kwargs)

    return noting


def _of_base(name: str) -> dict[str, Tensor]:
    return {key: t for key, t in batch(name, mask_named("right")).items() if key != "labels"}


CHECKPOINTED = [name for name in MASKED_LM if getattr(transformers, name).supports_gradient_checkpointing]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_dropout_replays_under_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = getattr(fastbert, name)(config_of(name, num_hidden_layers=2, **dropping(0.2))).train()
    other, inputs = copy.deepcopy(model), batch(name, mask_named("right"))
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        other.enable_input_require_grads()
    for m in (model, other):
        fastbert.patch(m, strict=True)
        torch.manual_seed(3)
        m(**inputs).loss.backward()
    assert_gradients_close(other, model, 1e-7)


def test_a_family_without_gradient_checkpointing_says_so() -> None:
    """ALBERT, in transformers too."""
    with pytest.raises(ValueError, match="AlbertModel does not support"):
        both("AlbertModel")[1].gradient_checkpointing_enable()


@pytest.mark.parametrize("name", ["AlbertModel", "DistilBertModel", "RobertaPreLayerNormModel"])
def test_compile(name: str) -> None:
    """A packed step, without a break in the graph."""
    sizes = {"num_hidden_layers": 1, "num_hidden_groups": 1, "inner_group_num": 1}
    fast = fastbert.patch(getattr(fastbert, name)(config_of(name, **sizes, **dropping(0.0))), strict=True).train()
    packed, _ = packed_and_padded(name)
    gradients = []
    for call in (fast, torch.compile(fast, backend="eager", fullgraph=True)):
        fast.zero_grad()
        call(**packed).last_hidden_state.square().sum().backward()
        gradients.append([p.grad for p in fast.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["DistilBertModel", "RobertaModel"])
def test_export_gives_transformers_own_program(name: str) -> None:
    stock, fast = both(name)
    inputs = batch(name, mask_named("right"))
    program = torch.export.export(fast, (), inputs)
    expected, actual = stock(**inputs), program.module()(**inputs)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not any("fastbert" in str(node.target) for node in program.graph.nodes)
