"""Every class of every family but BERT's, which has tests of its own, and what they are tested with.

Dimension key:  B batch   L padded length   T packed tokens
"""

import functools
import sys
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastbert
from fastbert.families import CLASSES, FAMILIES
from tests.models import CAUSAL, config_of, head_of, labels_for, padded, pair

SAME = ("camembert", "data2vec_text", "xlm_roberta")  # by RoBERTa's table: no code of their own


def names(*families: str) -> list[str]:
    """The classes that one can load."""
    of = {stock: fast.__module__.rpartition(".")[2] for stock, fast in CLASSES.items()}
    return [stock.__name__ for stock in of if issubclass(stock, PreTrainedModel) and of[stock] in families]


OTHERS = [family for family in FAMILIES if family not in ("bert", *SAME)]
# Before transformers 5.17 these lack the pooler that they read: they cannot run at all.
BROKEN = ("CamembertForMultipleChoice", "XLMRobertaForMultipleChoice")
BROKEN = BROKEN if Version(transformers.__version__) < Version("5.17") else ()
IN_FULL, SMOKE = names(*OTHERS), [name for name in names(*SAME) if name not in BROKEN]
BASES = [name for name in IN_FULL if head_of(name) == "Model"]
MASKED_LM = [name for name in IN_FULL if head_of(name) == "ForMaskedLM"]
LEFT_TO_RIGHT = [name for name in IN_FULL if head_of(name) in CAUSAL]
WITH_LABELS = [name for name in IN_FULL if head_of(name) not in ("Model", "ForQuestionAnswering")]
LIKE_ROBERTA = [name for name in BASES if "Roberta" in name]

DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "classifier_dropout",
    "classifier_dropout_prob",
    "seq_classif_dropout",
    "qa_dropout",
    "summary_last_dropout",
)


def dropping(p: float) -> dict[str, float]:
    """For `config_of`: all dropouts of any family."""
    return dict.fromkeys(DROPOUTS, p)


def both(name: str, *, strict: bool = False, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """transformers' model and fastbert's, with the same weights, in evaluation mode, without dropouts.

    They are built once for all tests, which leave them as they are but for gradients and the mode.

    options: of `patch`.
    """
    stock, fast = _built(name)
    for model in (stock, fast):
        model.eval().zero_grad(set_to_none=True)
    return stock, fastbert.patch(fast, strict=strict, **options)


@functools.cache
def _built(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return pair(name, config_of(name, num_hidden_layers=2, **dropping(0.0)))


def reads_first(model: nn.Module) -> bool:
    """Whether it looks at the first token's hidden state of each row by itself."""
    pools = getattr(model.base_model, "pooler", None) is not None
    return pools or head_of(type(model).__name__) in ("ForSequenceClassification", "ForMultipleChoice")


def without_cache(name: str) -> dict[str, Any]:
    """What a decoder needs in evaluation, to run packed."""
    return {"use_cache": False} if head_of(name) in CAUSAL else {}


LENGTHS = (4, 1, 9, 3)


def packed_and_padded(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same sequences, with labels, twice. Of multiple choice, a row of the packed batch is one choice."""
    rows, L = len(LENGTHS), max(LENGTHS)
    seqlens = torch.tensor(LENGTHS)
    mask = torch.arange(L) < seqlens[:, None]
    ids = padded(name, torch.randint(1, 100, (rows, L)), mask)
    rectangle = {"input_ids": ids, "attention_mask": mask.long(), **labels_for(name, ids, mask)}
    if head_of(name) == "ForQuestionAnswering":
        rectangle |= {"start_positions": torch.tensor([3, 0, 2, 1]), "end_positions": torch.tensor([3, 0, 8, 2])}
    packed = {key: pack(t, mask) for key, t in rectangle.items() if key != "attention_mask"}
    cu_seqlens = torch.cat([torch.zeros(1), seqlens.cumsum(0)]).int()
    return packed | {"cu_seq_lens_q": cu_seqlens, "max_length_q": L}, rectangle


def pack(of_tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, L, ...) to (1, T, ...); what has no row a token stays."""
    return of_tokens[mask.bool()][None] if of_tokens.shape[:2] == mask.shape else of_tokens


def module_of(family: str) -> Any:
    """A family's file."""
    return sys.modules[f"fastbert.families.{family}"]
