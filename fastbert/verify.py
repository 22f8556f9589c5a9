"""A checkpoint on fastbert against transformers, and both against transformers in float64.

Every hidden state, every output and the gradient of every parameter, under every kind of attention mask. What is
padding is not compared: fastbert's hidden states must be zero there.

Dimension key:  B batch   L padded length   V vocabulary
"""

import contextlib
import copy
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from fastbert.errors import InputError
from fastbert.families import CLASSES
from fastbert.families._base import max_tokens
from fastbert.inference.loading import load_config, load_model, vocabulary_size
from fastbert.patching import patch, report

TOLERANCE = 1e-5
MASKS = ("none", "right padding", "left padding", "holes", "all-padding row", "one token", "full length")
_NAMES = {"prediction_logits": "prediction logits", "seq_relationship_logits": "NSP logits"}
_RANDOM_LENGTHS = (37, 5, 64, 21)
# A parameter whose float64 gradient is below this share of the largest one has none: the softmax cancels keys' biases.
_NO_GRADIENT = 1e-10


@dataclass(frozen=True)
class Row:
    """One output of the model, or the gradient of one parameter, under one mask.

    Attributes:
        mask: one of MASKS.  output: what is compared; all gradients of a layer have one name.
        parameter: whose gradient it is; None for an output.
        difference: fastbert against transformers.  fast_error, stock_error: each against float64. Of an output, the
            largest absolute difference of an element; of a gradient, ||difference|| / ||float64 gradient||. A gradient
            that is mathematically zero (keys' biases) is measured against the largest one.
        cosine: the smallest of any token or sequence, or of the gradient, fastbert against transformers.
        scale: the largest float64 value of an output, 1 for a gradient; rounding is relative to it.
        used: the share of its tolerance that the row takes, see `verify`.
    """

    mask: str
    output: str
    parameter: str | None
    difference: float
    fast_error: float
    stock_error: float
    cosine: float
    scale: float
    used: float = math.inf

    @property
    def ok(self) -> bool:
        return self.used <= 1


@dataclass(frozen=True)
class Case:
    """One mask.

    Attributes:
        shape: (B, L).  tokens: those that are no padding.
        fallbacks: why calls fell back to transformers, and how many of the two did.
        clean: all outputs are finite, and packed calls have zeros in every padded row of every hidden state.
    """

    mask: str
    shape: tuple[int, int]
    tokens: int
    fallbacks: Counter[str]
    clean: bool


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `ok` is the verdict."""

    model: str
    device: str
    dtype: torch.dtype
    rows: list[Row]
    cases: list[Case]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows) and all(case.clean for case in self.cases)

    def worst(self) -> list[Row]:
        """For each output the row that takes most of its tolerance."""
        worst: dict[str, Row] = {}
        for row in self.rows:
            if row.output not in worst or row.used > worst[row.output].used:
                worst[row.output] = row
        return list(worst.values())


def load_architecture(name: str) -> PreTrainedModel:
    """A checkpoint as the class that its config names, heads included; else as its base model.

    Raises:
        InputError: see `fastbert.inference.loading.load_model`.
    """
    known = {stock.__name__ for stock in CLASSES if issubclass(stock, PreTrainedModel)}
    named = [each for each in load_config(name).architectures or () if each in known]
    return load_model(getattr(transformers, named[0]) if named else transformers.AutoModel, name)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Calls that fall back are found here, and named in what is returned."""
    logger = logging.getLogger("fastbert")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@_unlogged()
def verify(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tolerance: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Run one set of weights three times: fastbert, transformers (SDPA), and transformers in float64.

    Eval mode, no dropout. Gradients are those of a fixed random projection of all outputs of valid tokens, without
    `output_hidden_states`. The float64 model has the weights as rounded to `dtype`.

    A row is ok if its error against float64 is at most twice transformers' own, the largest under any mask, and one
    rounding. In float32 it is also ok, and this is the rule that nearly every row meets, if it is within 1e-5 of
    transformers.

    Args:
        model: a transformers model that is not patched; it stays as it is.
        sequences: token ids of at least one text; random ones of a fixed seed where it is None.
        tolerance: for fastbert against transformers, on an output's largest absolute difference and on a gradient's
            relative one, instead of these rules.
        progress: called with 1 after each of `len(MASKS)` cases.

    Raises:
        InputError: if fastbert does not know the model, or an id is not in its vocabulary.
    """
    if sequences is not None and not any(sequences):
        raise InputError("there are no tokens to verify with")
    stock = copy.deepcopy(model).to(device, dtype).eval()  # type: ignore[arg-type]
    stock.set_attn_implementation("sdpa")
    exact = copy.deepcopy(stock).double()
    try:
        fast = patch(copy.deepcopy(stock))
    except ValueError as error:
        raise InputError(str(error)) from error
    batches = _batches(stock, sequences)
    rows: list[Row] = []
    cases: list[Case] = []
    for mask, (input_ids, attention_mask) in zip(MASKS, batches, strict=True):
        inputs = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        second_half = (torch.arange(input_ids.shape[1]) >= input_ids.shape[1] // 2).long().expand_as(input_ids)
        if getattr(stock.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = second_half
        if getattr(stock.config, "use_task_id", False):
            inputs["task_type_ids"] = second_half
        inputs = {name: t.to(device) for name, t in inputs.items()}
        valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        before = report(fast)
        runs = [_run(each, inputs, valid) for each in (fast, stock, exact)]
        fallbacks = report(fast).fallbacks - before.fallbacks
        rows += _value_rows(mask, [run.values for run in runs], valid)
        rows += _gradient_rows(mask, [run.gradients for run in runs])
        cases.append(
            Case(
                mask,
                (input_ids.shape[0], input_ids.shape[1]),
                int(valid.sum()),
                fallbacks,
                _is_clean(runs[0].values, valid, packed=not fallbacks),
            )
        )
        if progress is not None:
            progress(1)
    judged = _judge(rows, dtype, tolerance)
    return Verification(type(stock).__name__, str(stock.device), dtype, judged, cases)


def _batches(model: PreTrainedModel, sequences: Sequence[Sequence[int]] | None) -> list[tuple[Tensor, Tensor | None]]:
    """(B, L) ids and mask for each of MASKS."""
    longest, vocabulary = max_tokens(model), vocabulary_size(model)
    pad = model.config.pad_token_id or 0
    generator = torch.Generator().manual_seed(0)
    if sequences is None:
        texts = [torch.randint(vocabulary, (min(n, longest),), generator=generator) for n in _RANDOM_LENGTHS]
    else:
        texts = [torch.tensor(ids[:longest]) for ids in sequences if len(ids)]
        highest = max(int(ids.max()) for ids in texts)
        if highest >= vocabulary:
            raise InputError(f"the tokenizer has id {highest}, but the model a vocabulary of {vocabulary}")
    stream = torch.cat(texts)
    if len(texts) == 1:
        texts += [stream[: max(1, len(stream) // 2)]]  # so that there is padding
    L = max(len(ids) for ids in texts)
    right, left = torch.full((2, len(texts), L), pad)
    right_mask, left_mask = torch.zeros(2, len(texts), L, dtype=torch.long)
    for row, ids in enumerate(texts):
        right[row, : len(ids)], right_mask[row, : len(ids)] = ids, 1
        left[row, L - len(ids) :], left_mask[row, L - len(ids) :] = ids, 1
    holes = right_mask * (torch.rand(right.shape, generator=generator) > 0.25)
    holes[:, 0] = 1
    with_empty = right_mask.clone()
    with_empty[-1] = 0
    return [
        (_repeat(stream, len(texts) * L).view(-1, L), None),
        (right, right_mask),
        (left, left_mask),
        (right.where(holes != 0, pad), holes),
        (right.where(with_empty != 0, pad), with_empty),
        (stream[:1][None], None),
        (_repeat(stream, longest)[None], None),
    ]


def _repeat(ids: Tensor, length: int) -> Tensor:
    return ids.repeat(-(-length // len(ids)))[:length]


@dataclass(frozen=True)
class _Run:
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _run(model: PreTrainedModel, inputs: dict[str, Tensor], valid: Tensor) -> _Run:
    """Once for the hidden states, and once as it is trained, for the outputs and the gradients."""
    inputs = dict(inputs)
    if type(model).__name__.endswith("MultipleChoice"):
        inputs.pop("task_type_ids", None)  # which transformers does not flatten
        inputs = {name: t[:, None] for name, t in inputs.items()}
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        hidden_states = model(**inputs, output_hidden_states=True).hidden_states
    values |= {f"hidden state {i}": hidden for i, hidden in enumerate(hidden_states)}

    pooled: list[Tensor] = []
    pooler = getattr(model.base_model, "pooler", None)
    hook = pooler.register_forward_hook(lambda _module, _args, output: pooled.append(output)) if pooler else None
    output = cast(ModelOutput, model(**inputs))
    if hook is not None:
        hook.remove()
        values["pooler_output"] = pooled[0]
    values |= {_NAMES.get(name, name): t for name, t in output.items() if isinstance(t, Tensor)}

    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=valid.device)
    for name, t in values.items():
        if t.requires_grad:
            chosen = _valid_rows(name, t, valid)
            projection = torch.randn(chosen.shape, generator=generator, dtype=torch.float64)
            loss = loss + (chosen.double() * projection.to(valid.device)).sum() / math.sqrt(chosen.numel())
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return _Run({name: t.detach() for name, t in values.items()}, gradients)


def _per_token(name: str, t: Tensor, valid: Tensor) -> bool:
    """Answers' logits, and those of a discriminator, are (B, L)."""
    return t.ndim == 3 or (name.endswith("logits") and t.shape == valid.shape)


def _valid_rows(name: str, t: Tensor, valid: Tensor) -> Tensor:
    """Those tokens of an output, or those sequences, that are no padding."""
    return t[valid] if _per_token(name, t, valid) else t[valid.any(-1)]


def _is_clean(values: dict[str, Tensor], valid: Tensor, packed: bool) -> bool:
    if not all(bool(t.isfinite().all()) for t in values.values()):
        return False
    padded = [t[~valid] for name, t in values.items() if name.startswith(("hidden state", "last_hidden_state"))]
    return not packed or all(bool((t == 0).all()) for t in padded)


def _value_rows(mask: str, runs: list[dict[str, Tensor]], valid: Tensor) -> list[Row]:
    rows = []
    for name in runs[2]:
        fast, stock, exact = (_valid_rows(name, run[name], valid).double() for run in runs)
        difference, fast_error, stock_error = (
            float(t.abs().max()) for t in (fast - stock, fast - exact, stock - exact)
        )
        vectors = (fast[None], stock[None]) if fast.ndim == 1 else (fast, stock)
        cosine = float(F.cosine_similarity(*vectors, dim=-1, eps=1e-300).min())
        scale = float(exact.abs().max())
        rows.append(Row(mask, name, None, difference, fast_error, stock_error, cosine, scale))
    return rows


def _gradient_rows(mask: str, runs: list[dict[str, Tensor]]) -> list[Row]:
    norms = {name: float(exact.norm()) for name, exact in runs[2].items()}
    largest = max(norms.values())
    rows = []
    for name, norm in norms.items():
        fast, stock, exact = (run.get(name, torch.full_like(runs[2][name], math.nan)) for run in runs)
        has_gradient = norm > _NO_GRADIENT * largest
        relative_to = norm if has_gradient else largest
        difference, fast_error, stock_error = (
            float(t.norm()) / relative_to for t in (fast - stock, fast - exact, stock - exact)
        )
        cosine = float(F.cosine_similarity(fast.flatten(), stock.flatten(), dim=0, eps=1e-300)) if has_gradient else 1.0
        rows.append(Row(mask, f"grad. {_part(name)}", name, difference, fast_error, stock_error, cosine, 1.0))
    return rows


def _part(parameter: str) -> str:
    layer = re.search(r"layer(?:s|_groups)?\.(\d+)\.", parameter)
    if layer:
        return f"layer {layer[1]}"
    return "embeddings" if "embedding" in parameter else "heads"


def _judge(rows: list[Row], dtype: torch.dtype, tolerance: float | None) -> list[Row]:
    """With `used`: none where both are equal. transformers' error is over all masks: under one it may be luck."""
    stock_errors: dict[tuple[str, str | None], float] = {}
    for row in rows:
        key = row.output, row.parameter
        stock_errors[key] = max(stock_errors.get(key, 0.0), row.stock_error)
    judged = []
    for row in rows:
        bound = 2 * stock_errors[row.output, row.parameter] + torch.finfo(dtype).eps / 2 * row.scale
        if row.difference == 0:
            used = 0.0
        elif tolerance is not None:
            used = _share(row.difference, tolerance)
        elif dtype == torch.float32:
            used = min(_share(row.fast_error, bound), _share(row.difference, TOLERANCE))
        else:
            used = _share(row.fast_error, bound)
        judged.append(replace(row, used=used))
    return judged


def _share(measured: float, bound: float) -> float:
    if math.isnan(measured) or (measured > 0 and bound == 0):
        return math.inf
    return measured / bound if measured else 0.0
