"""The models that are pretrained and evaluated: which class, from which weights, for which vocabulary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

import fastbert
from fastbert.data.store import Store, read_json
from fastbert.errors import InputError
from fastbert.inference.loading import load_config as load_checkpoint_config
from fastbert.inference.loading import load_tokenizer, load_weights
from fastbert.terminal import counted
from fastbert.training import checkpoints, files
from fastbert.training.recipe import Recipe, check_config, load_config

_CLASSES = {
    "mlm+nsp": fastbert.BertForPreTraining,
    "mlm": fastbert.BertForMaskedLM,
    "left-to-right": fastbert.BertLMHeadModel,
}
_MAY_BE_NEW = {"pooler.": "pooler", "seq_relationship.": "next-sentence head", "cls.predictions.": "masked-LM head"}
NEXT_SENTENCE = "seq_relationship."


def to_pretrain(recipe: Recipe, store: Store) -> tuple[Any, list[str]]:
    """The model with its first weights, and what in it is new though it begins with a checkpoint.

    The same in every process: what is drawn comes from the seed.

    Raises:
        InputError: if there is no such configuration or checkpoint, or it is not for this corpus.
    """
    objective = recipe.sampling.objective
    if objective not in _CLASSES:
        raise InputError(f"the objective {objective} has no model")
    kind: Any = _CLASSES[objective]
    options = {"is_decoder": True, "use_cache": False} if objective == "left-to-right" else {}
    new: list[str] = []
    torch.manual_seed(recipe.sampling.seed)
    if recipe.init_from is not None:
        model, new = _begun(kind, recipe.init_from, store, options)
    else:
        assert recipe.config is not None
        config = load_config(recipe.config, store)
        config.update(options)
        model = kind(config)
    if recipe.dropout is not None:
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = recipe.dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = recipe.dropout
    return fastbert.patch(model, residual_dtype=recipe.residual_dtype), new


def _begun(kind: Any, name: str, store: Store, options: Mapping[str, Any]) -> tuple[Any, list[str]]:
    check_no_run(name)
    found = load_checkpoint_config(name)
    if found.model_type != "bert":
        raise InputError(f"{name} is of type {found.model_type!r}, and only bert can be pretrained")
    check_config(found, name, store)
    _check_vocabulary(name, found.vocab_size, store)
    model, missing = load_weights(kind, name, **options)
    new = {key: next((what for part, what in _MAY_BE_NEW.items() if part in key), None) for key in missing}
    if lost := [key for key, what in new.items() if what is None]:
        raise InputError(f"{name} is not whole: it lacks {len(lost)} weights of its encoder, as {lost[0]}")
    if broken := [key for key, p in model.named_parameters() if not p.isfinite().all()]:
        raise InputError(f"{name} has weights that are not finite: {broken[0]}")
    return model, sorted({what for what in new.values() if what is not None})


def check_no_run(name: str) -> None:
    """Raises: InputError, if a run's folder is given where a checkpoint is wanted."""
    if (Path(name) / files.RUN).is_file():
        raise InputError(f"{name} is a run's folder: give its {files.MODEL}, {files.BEST}, or a checkpoint in there")


def has_next_sentence_head(name: str) -> bool:
    """Whether a checkpoint holds one: what its configuration says of its class may be that of another save."""
    _, missing = load_weights(AutoModelForPreTraining, name)
    return not any(NEXT_SENTENCE in key for key in missing)


def of_run(name: str) -> tuple[str, list[int]]:
    """The checkpoint that a run's folder stands for, or any other itself; and the max_length of its run's phases."""
    path = Path(name)
    run = path if (path / files.RUN).is_file() else path.resolve().parent
    about = read_json(run / files.RUN)
    if about is None:
        return name, []
    if run == path:
        found = path / files.MODEL if (path / files.MODEL).is_dir() else checkpoints.last_checkpoint(path)
        if found is None:
            best = f": its best so far is {path / files.BEST}" if (path / files.BEST).is_dir() else ""
            raise InputError(f"{name} has no model yet, and no checkpoint{best}")
        name = str(found)
    return name, [length for length, _ in about.get("fixed", {}).get("phases", [])]


def to_evaluate(name: str, store: Store) -> tuple[Any, str]:
    """A model that is patched and in evaluation mode, and the objective that it was trained with.

    Raises:
        InputError: if it cannot be loaded, has no head that predicts words, or not the store's vocabulary.
    """
    config = load_checkpoint_config(name)
    _check_vocabulary(name, config.vocab_size, store)
    objective = "left-to-right" if getattr(config, "is_decoder", False) else "mlm"
    if objective == "left-to-right":
        model, missing = load_weights(AutoModelForCausalLM, name, use_cache=False)
    else:
        model, missing = load_weights(AutoModelForPreTraining, name)
        if hasattr(getattr(model, "cls", None), "seq_relationship"):
            objective = "mlm+nsp"
            if any(NEXT_SENTENCE in key for key in missing):
                objective = "mlm"
                model, missing = load_weights(AutoModelForMaskedLM, name)
    if missing:
        lacks = f"{counted(len(missing), 'weight')}, {missing[0]} among them"
        raise InputError(f"{name} predicts no words: it lacks {lacks}, which pretrain --init-from {name} would train")
    return fastbert.patch(model.eval()), objective


def _check_vocabulary(name: str, vocab_size: int, store: Store) -> None:
    """Raises: InputError, if a checkpoint's tokens are not the store's. One without a tokenizer goes by its size."""
    ours = AutoTokenizer.from_pretrained(store.path).get_vocab()
    if vocab_size < store.vocab_size:
        raise InputError(
            f"{name} has a vocabulary of {vocab_size:,} tokens, but {store.path} one of {store.vocab_size:,}."
            f" Prepare the text with --vocab {name}"
        )
    try:
        theirs = load_tokenizer(name).get_vocab()
    except InputError:
        return
    different = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if different:
        raise InputError(
            f"{store.path} has another vocabulary than {name}: {len(different):,} tokens differ, as {different[0]!r}."
            f" Prepare the text with --vocab {name}"
        )
