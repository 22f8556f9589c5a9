"""What a pretraining run is asked to do, and the model's configuration."""

import difflib
import importlib.resources
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import transformers

from fastbert.data.pretraining import Phase, Sampling
from fastbert.data.store import Store
from fastbert.errors import InputError

DTYPES = ("fp32", "bf16")
NON_FINITE = ("stop", "continue")
_SEEDS = 1 << 63
_LENGTHS = (5, 65535)  # of the C++ core: a pair of sentences of a token each, and 16 bits
_CONFIGS = importlib.resources.files("fastbert.training") / "configs"
# May be other ones when a run goes on: they change nothing of what is learnt.
_FREE = (
    "save_every",
    "keep",
    "log_every",
    "threads",
    "accumulation",
    "gradient_checkpointing",
    "fsdp",
    "non_finite_loss",
    "eval_every",
    "eval_sequences",
    "report_to",
)
_EVALUATIONS = 20  # of a run, at least


@dataclass(frozen=True)
class Recipe:
    """A pretraining run. The defaults are those of BERT, https://arxiv.org/abs/1810.04805, section A.2.

    Attributes:
        config: a name of those that fastbert has, a BertConfig's JSON file, or a checkpoint's folder.
        init_from: a checkpoint whose weights training begins with; instead of config.
        steps: optimiser steps of all phases.
        phases: (max_length, share of the steps), one after the other.
        sampling: what becomes of the text, and the batch.
        dropout: None for what the configuration says.
        accumulation: batches of each process whose gradients are added up in a step.
        clip: the gradient's largest norm; 0 for any.
        non_finite_loss: "stop", when a step's loss or gradient is not finite, or "continue" without that step.
        save_every, log_every: steps.  keep: the last so many checkpoints.
        threads: of the input pipeline; 0 for one a core.
        eval_every: steps between evaluations on the corpus' held-out part; 0 for none; None, where it has one, for as
            often as checkpoints are saved, and 20 times at least.
        eval_sequences: that are evaluated on, at most.
        report_to: names of transformers' integrations, such as wandb or mlflow, that get the figures too.
    """

    config: str | None = "base"
    init_from: str | None = None
    steps: int = 1_000_000
    phases: tuple[tuple[int, float], ...] = ((128, 0.9), (512, 0.1))
    sampling: Sampling = field(default_factory=Sampling)
    learning_rate: float = 1e-4
    warmup: int = 10_000
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    clip: float = 1.0
    dropout: float | None = None
    dtype: str = "fp32"
    residual_dtype: str | None = None
    accumulation: int = 1
    gradient_checkpointing: bool = False
    fsdp: bool = False
    non_finite_loss: str = "stop"
    save_every: int = 5_000
    keep: int = 3
    log_every: int = 100
    threads: int = 0
    eval_every: int | None = None
    eval_sequences: int = 1024
    report_to: tuple[str, ...] = ()

    @property
    def evaluated_every(self) -> int:
        """Steps."""
        return self.eval_every or min(self.save_every, max(1, self.steps // _EVALUATIONS))

    def check(self) -> None:
        """Raises: InputError, naming the option that cannot be."""
        if (self.config is None) == (self.init_from is None):
            raise InputError("exactly one of a configuration and a checkpoint to begin with must be given")
        for name in ("steps", "accumulation", "save_every", "keep", "log_every", "eval_sequences"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.eval_every is not None and self.eval_every < 0:
            raise InputError(f"eval_every must be at least 0, which is for never, but is {self.eval_every}")
        if not 0 <= self.warmup <= self.steps:
            raise InputError(
                f"the warm-up must be in [0, {self.steps:,}], the run's steps, but is {self.warmup:,} steps"
            )
        if self.warmup == self.steps == 1:
            raise InputError("a run of 1 step with a warm-up of 1 trains nothing: the learning rate begins with 0")
        for name, known in (("dtype", DTYPES), ("non_finite_loss", NON_FINITE)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, but is {getattr(self, name)}")
        sampling = self.sampling
        masked = sampling.objective != "left-to-right"
        # Written so that NaN is out of each.
        for good, what, bound, value in (
            (0 < self.learning_rate < math.inf, "the learning rate", "positive and finite", self.learning_rate),
            (0 <= self.weight_decay < math.inf, "the weight decay", "at least 0 and finite", self.weight_decay),
            (self.clip >= 0, "the clip", "at least 0, which is for none", self.clip),
            (0 <= self.beta1 < 1, "beta1", "in [0, 1)", self.beta1),
            (0 <= self.beta2 < 1, "beta2", "in [0, 1)", self.beta2),
            (0 <= self.epsilon < math.inf, "epsilon", "at least 0 and finite", self.epsilon),
            (self.dropout is None or 0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout),
            (0 < sampling.mask_rate <= 1 or not masked, "the mask rate", "in (0, 1]", sampling.mask_rate),
            (0 <= sampling.seed < _SEEDS, "the seed", "in [0, 2^63)", sampling.seed),
        ):
            if not good:
                raise InputError(f"{what} must be {bound}, but is {value}")
        if any(not share > 0 for _, share in self.phases):
            raise InputError("every phase must have a share of the steps that is above 0")
        if not abs(sum(share for _, share in self.phases) - 1) <= 1e-6:
            raise InputError("the phases' shares of the steps must add up to 1")
        for length, _ in self.phases:
            if not _LENGTHS[0] <= length <= _LENGTHS[1]:
                raise InputError(f"a phase's max_length must be in [{_LENGTHS[0]}, {_LENGTHS[1]}], but is {length}")

    def phase_steps(self) -> tuple[Phase, ...]:
        """The phases in steps, none of them empty where there are steps enough."""
        ends, total = [], 0.0
        for _, share in self.phases:
            total += share
            ends.append(round(total * self.steps))
        starts = [0, *ends[:-1]]
        return tuple(
            Phase(length, end - start) for (length, _), start, end in zip(self.phases, starts, ends, strict=True)
        )

    def saved(self, store: Store, config: transformers.PreTrainedConfig) -> dict[str, Any]:
        """What run.json holds: what must stay the same while a run goes on, and what need not."""
        options = json.loads(json.dumps(asdict(self)))
        return {
            "fixed": {
                **{name: value for name, value in options.items() if name not in _FREE},
                "corpus": store.fingerprint,
                "model": {f: getattr(config, f) for f in ("vocab_size", *_MODEL_FIELDS) if hasattr(config, f)},
            },
            "free": {name: options[name] for name in _FREE},
            "entropy": store.entropy,
        }


_MODEL_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
)


def config_names() -> list[str]:
    """The configurations that fastbert has."""
    return sorted(entry.name.removesuffix(".json") for entry in _CONFIGS.iterdir() if entry.name.endswith(".json"))


def load_config(name: str, store: Store) -> transformers.BertConfig:
    """A BERT configuration for a corpus, whose vocabulary it takes if it names none.

    Raises:
        InputError: if there is none of this name, a key or a value cannot be, or it does not fit the corpus.
    """
    path = Path(name)
    if name in config_names():
        source, text = name, (_CONFIGS / f"{name}.json").read_text(encoding="utf-8")
    else:
        source = str(path / "config.json" if path.is_dir() else path)
        try:
            text = Path(source).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{name} is no configuration: there are {', '.join(config_names())}, or give a JSON file"
            ) from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{source} must hold a JSON object")
    config = _bert_config(content, source, store.vocab_size)
    check_config(config, source, store)
    return config


def check_config(config: Any, source: str, store: Store) -> None:
    """Raises: InputError, if the model does not fit the corpus."""
    if config.vocab_size != store.vocab_size:
        raise InputError(
            f"{source} has a vocabulary of {config.vocab_size:,} tokens, but {store.path} one of {store.vocab_size:,}"
        )
    if config.type_vocab_size < 2:
        raise InputError(f"{source}: type_vocab_size is {config.type_vocab_size}, but sentence pairs need 2")


def _bound(key: str, value: Any) -> str | None:
    """What a configuration's value must be, if it is not."""
    if isinstance(value, str):
        return None
    if key.endswith("_prob"):
        return None if 0 <= value < 1 else "in [0, 1)"
    if key == "layer_norm_eps":
        return None if 0 <= value < math.inf else "at least 0 and finite"
    return None if value >= 1 else "at least 1"


def _bert_config(content: dict[str, Any], source: str, vocab_size: int) -> transformers.BertConfig:
    default = transformers.BertConfig()
    known = default.to_dict()
    for key, value in content.items():
        if key not in known and not hasattr(default, key):
            close = difflib.get_close_matches(key, list(known), 1)
            raise InputError(f"{source}: there is no {key}" + (f", perhaps {close[0]}" if close else ""))
        if key in _MODEL_FIELDS or key == "vocab_size":
            kind = (int, float) if isinstance(known[key], float) else type(known[key])
            if isinstance(value, bool) or not isinstance(value, kind):
                what = "a name" if isinstance(known[key], str) else "a number"
                raise InputError(f"{source}: {key} must be {what}, but is {value!r}")
            bound = _bound(key, value)
            if bound is not None:
                raise InputError(f"{source}: {key} must be {bound}, but is {value}")
    if content.get("model_type", "bert") != "bert":
        raise InputError(f"{source}: model_type is {content['model_type']}, and only bert can be pretrained")
    try:
        config = transformers.BertConfig(**{"vocab_size": vocab_size, **content})
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: {str(error).splitlines()[0]}") from error
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{source}: hidden_size {config.hidden_size} is no multiple of num_attention_heads"
            f" {config.num_attention_heads}"
        )
    return config
