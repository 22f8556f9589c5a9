"""Bad input gets a Python error that names the argument and the bound, before any operator runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastbert
from fastbert.families._base import max_tokens
from tests.families import BASES, MASKED_LM, SMOKE, both
from tests.models import BATCH, LENGTH, config_of, pair, tiny_config


@pytest.fixture(scope="module")
def model() -> fastbert.BertModel:
    return pair("BertModel")[1]


def _ids(rows: int = BATCH, length: int = LENGTH, **changes: int) -> torch.Tensor:
    ids = torch.randint(1, 100, (rows, length))
    for value in changes.values():
        ids[-1, -1] = value
    return ids


LONG = torch.ones(BATCH, LENGTH, dtype=torch.long)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "id too large": ({"input_ids": _ids(bad=100)}, r"input_ids has 100, not in \[0, 100\): vocab_size is 100"),
    "id negative": ({"input_ids": _ids(bad=-1)}, r"input_ids has -1, not in \[0, 100\)"),
    "token type": (
        {"input_ids": _ids(), "token_type_ids": 2 * LONG},
        r"token_type_ids has 2, not in \[0, 2\): type_vocab_size is 2",
    ),
    "position": (
        {"input_ids": _ids(), "position_ids": 64 * LONG},
        r"position_ids has 64, not in \[0, 64\): max_position_embeddings is 64",
    ),
    "too long": ({"input_ids": _ids(2, 65)}, "the batch is 65 tokens long, but max_position_embeddings is 64"),
    "mask shape": ({"input_ids": _ids(), "attention_mask": LONG[:, 1:]}, r"attention_mask is \(5, 16\), not \(5, 17\)"),
    "mask dimensions": (
        {"input_ids": _ids(), "attention_mask": LONG[:, None]},
        r"attention_mask must be 2-D or 4-D, but is \(5, 1, 17\)",
    ),
    "types shape": (
        {"input_ids": _ids(), "token_type_ids": LONG[:3]},
        r"token_type_ids is \(3, 17\), not \(5, 17\) as the batch",
    ),
    "positions shape": (
        {"input_ids": _ids(), "position_ids": LONG[:, :4]},
        r"position_ids is \(5, 4\), not \(5, 17\) as the batch",
    ),
    "ids dtype": ({"input_ids": _ids().float()}, "input_ids must be int64 or int32, but is torch.float32"),
    "types dtype": (
        {"input_ids": _ids(), "token_type_ids": LONG.half()},
        "token_type_ids must be int64 or int32, but is torch.float16",
    ),
    "ids dimensions": ({"input_ids": _ids()[0]}, r"input_ids must be \(batch, length\), but is \(17,\)"),
    "both": (
        {"input_ids": _ids(), "inputs_embeds": torch.randn(BATCH, LENGTH, 48)},
        "exactly one of input_ids or inputs_embeds",
    ),
    "neither": ({}, "exactly one of input_ids or inputs_embeds"),
    "embeds dtype": ({"inputs_embeds": torch.ones(2, 3, 48).long()}, "inputs_embeds must be floating point"),
    "embeds size": (
        {"inputs_embeds": torch.randn(2, 3, 47)},
        "inputs_embeds has 47 features, not 48 as the model's embeddings",
    ),
    "no sequence": ({"input_ids": _ids(0)}, "input_ids is empty: 0 sequences of 17 tokens"),
    "no token": ({"input_ids": _ids(3, 0)}, "input_ids is empty: 3 sequences of 0 tokens"),
    "device": ({"input_ids": _ids().to("meta")}, "input_ids is on meta, but the model on cpu"),
    "mask device": (
        {"input_ids": _ids(), "attention_mask": LONG.to("meta")},
        "attention_mask is on meta, but the model on cpu",
    ),
    "positions restart": (
        {"input_ids": _ids(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        "position_ids restart within a row.*cu_seq_lens_q and max_length_q",
    ),
    "packed rows": (
        {"input_ids": _ids(2, 6), "cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32), "max_length_q": 6},
        r"one row of packed tokens, \(1, T\), but it has 2 rows",
    ),
    "packed end": (
        {"input_ids": _ids(1, 6), "cu_seq_lens_q": torch.tensor([0, 5], dtype=torch.int32), "max_length_q": 6},
        "cu_seqlens must rise from 0 to the number of tokens, 6",
    ),
    "packed order": (
        {"input_ids": _ids(1, 6), "cu_seq_lens_q": torch.tensor([0, 4, 3, 6], dtype=torch.int32), "max_length_q": 6},
        "cu_seqlens must rise",
    ),
    "packed dtype": (
        {"input_ids": _ids(1, 6), "cu_seq_lens_q": torch.tensor([0, 6]), "max_length_q": 6},
        r"cu_seqlens must be \(batch \+ 1,\) int32",
    ),
    "packed longest": (
        {"input_ids": _ids(1, 6), "cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32), "max_length_q": 4},
        "max_seqlen is 4, but the longest sequence has 6 tokens",
    ),
    "packed mask": (
        {
            "input_ids": _ids(1, 6),
            "attention_mask": torch.ones(1, 6),
            "cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32),
        },
        "attention_mask and cu_seq_lens_q exclude each other",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_inputs(case: str, model: fastbert.BertModel) -> None:
    inputs, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    assert torch.isfinite(model(_ids()).last_hidden_state).all()


def test_a_packed_sequence_longer_than_the_position_table(model: fastbert.BertModel) -> None:
    with pytest.raises(ValueError, match="a sequence of 65 tokens, but max_position_embeddings is 64"):
        model(_ids(1, 66), cu_seq_lens_q=torch.tensor([0, 65, 66], dtype=torch.int32), max_length_q=65)
    packed = model(_ids(1, 128), cu_seq_lens_q=torch.tensor([0, 64, 128], dtype=torch.int32), max_length_q=64)
    assert packed.last_hidden_state.shape == (1, 128, 48)


def test_ids_on_padding_may_be_anything(model: fastbert.BertModel) -> None:
    ids, mask = _ids(), torch.ones(BATCH, LENGTH)
    ids[:, -2:], mask[:, -2:] = -100, 0
    hidden = model(ids, mask).last_hidden_state
    assert torch.isfinite(hidden).all()
    assert (hidden[:, -2:] == 0).all()


def test_labels() -> None:
    model = fastbert.BertForMaskedLM(tiny_config()).train()
    with pytest.raises(ValueError, match=r"labels is \(5, 16\), not \(5, 17\) as the batch"):
        model(_ids(), labels=_ids()[:, 1:])
    labels = torch.full((BATCH, LENGTH), -100)
    labels[0, 0] = 100
    with pytest.raises(ValueError, match=r"labels has 100, not in \[0, 100\)"):
        model(_ids(), labels=labels)


@pytest.mark.parametrize("name", [*BASES, *(name for name in SMOKE if name.endswith("Model"))])
class TestOtherFamilies:
    """The same words; of those like RoBERTa, whose first positions are for padding, how long a text may be."""

    def test_ids(self, name: str) -> None:
        _, fast = both(name)
        with pytest.raises(ValueError, match=r"input_ids has 100, not in \[0, 100\): vocab_size is 100"):
            fast(_ids(bad=100))
        with pytest.raises(ValueError, match=r"input_ids has -1, not in \[0, 100\)"):
            fast(_ids(bad=-1))
        with pytest.raises(ValueError, match=r"position_ids has 64, not in \[0, 64\): max_position_embeddings is 64"):
            fast(_ids(), position_ids=64 * LONG)
        with pytest.raises(ValueError, match=r"inputs_embeds has 47 features, not \d+ as the model's embeddings"):
            fast(inputs_embeds=torch.randn(2, 3, 47))

    def test_token_types(self, name: str) -> None:
        _, fast = both(name)
        none = "DistilBert" in name
        bound = "1): this model has none but 0" if none else "2): type_vocab_size is 2"
        with pytest.raises(ValueError, match=re.escape(f"token_type_ids has 2, not in [0, {bound}")):
            fast(_ids(), token_type_ids=2 * LONG)
        ids = _ids()
        zeros = torch.zeros_like(ids)
        assert torch.equal(fast(ids, token_type_ids=zeros).last_hidden_state, fast(ids).last_hidden_state)

    def test_too_long(self, name: str) -> None:
        _, fast = both(name)
        most = max_tokens(fast)
        assert most == (62 if "berta" in name.lower() or name.startswith(("Camembert", "Data2Vec")) else 64)
        ids = torch.randint(3, 99, (2, most + 1))
        wrong = rf"{most + 1} tokens( long)?, but (the model takes 62: )?max_position_embeddings is 64"
        packed = {"cu_seq_lens_q": torch.tensor([0, most + 1, most + 3], dtype=torch.int32), "max_length_q": most + 1}
        calls: list[dict[str, Any]] = [
            {"input_ids": ids},
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            {"inputs_embeds": torch.randn(2, most + 1, getattr(fast.config, "embedding_size", 48))},
            {"input_ids": torch.randint(3, 99, (1, most + 3)), **packed},
        ]
        for call in calls:
            with pytest.raises(ValueError, match=wrong):
                fast(**call)
        assert torch.isfinite(fast(ids[:, 1:]).last_hidden_state).all()

    @pytest.mark.parametrize("first", [0, 2])
    def test_positions_that_restart(self, name: str, first: int) -> None:
        _, fast = both(name)
        given = {"input_ids": _ids(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]) + first}
        if first == 2 and max_tokens(fast) == 64:  # a user's own order
            assert torch.isfinite(fast(**given).last_hidden_state).all()
            return
        with pytest.raises(ValueError, match=r"position_ids restart within a row.*cu_seq_lens_q"):
            fast(**given)


def test_robertas_true_size() -> None:
    model = fastbert.RobertaModel(config_of("RobertaModel", num_hidden_layers=1, max_position_embeddings=514)).eval()
    with pytest.raises(ValueError, match="513 tokens, but the model takes 512: max_position_embeddings is 514"):
        model(torch.full((1, 513), 5))
    model(torch.full((1, 512), 5))


def test_task_types() -> None:
    with pytest.raises(ValueError, match=r"task_type_ids has 3, not in \[0, 3\): task_type_vocab_size is 3"):
        both("ErnieModel")[1](_ids(), task_type_ids=3 * LONG)


@pytest.mark.parametrize("name", MASKED_LM)
def test_labels_of_other_families(name: str) -> None:
    _, fast = both(name)
    with pytest.raises(ValueError, match=r"labels is \(5, 16\), not \(5, 17\) as the batch"):
        fast.train()(_ids(), labels=_ids()[:, 1:])
    with pytest.raises(ValueError, match=r"labels has 100, not in \[0, 100\)"):
        fast(_ids(), labels=_ids(bad=100))


def test_an_unknown_model_type_gets_the_families_that_work() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10)
    with pytest.raises(ValueError, match=r"(?is)(?=.*roberta)(?=.*distilbert)(?=.*electra)(?=.*albert)(?=.*ernie)"):
        fastbert.patch(transformers.GPT2Model(config))


class TestCheckpoints:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        pair("BertModel")[1].save_pretrained(tmp_path)
        return tmp_path

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="nowhere"):
            fastbert.BertModel.from_pretrained(tmp_path / "nowhere")

    def test_missing_weights(self, saved: Path) -> None:
        (saved / "model.safetensors").unlink()
        with pytest.raises(OSError, match=r"model\.safetensors"):
            fastbert.BertModel.from_pretrained(saved)

    def test_truncated_weights(self, saved: Path) -> None:
        weights = saved / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(Exception, match=r"(?i)(incomplete|truncated|invalid|metadata)"):
            fastbert.BertModel.from_pretrained(saved)

    def test_unknown_model_type(self, saved: Path) -> None:
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
        with pytest.raises(ValueError, match="no-such-model"):
            transformers.AutoModel.from_pretrained(saved)
