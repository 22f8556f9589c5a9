"""What is chosen where training goes on from a checkpoint, `--init-from`, and an option does not say otherwise."""

from collections.abc import Mapping
from typing import Any

from fastbert.data.pretraining import Sampling
from fastbert.data.store import Store
from fastbert.inference.loading import load_config
from fastbert.training.models import check_no_run, has_next_sentence_head
from fastbert.training.summary import tokens_a_step

STEPS = 10_000
EPOCHS = 40  # BERT's own number
LEARNING_RATE = 5e-5
WARMUP = 0.06  # of the steps
_LENGTHS = (128, 512)
_SHARE = 0.9  # of the steps, with the shorter one


def choose(
    init_from: str, store: Store, sampling: Sampling, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The objective, phases, steps, learning_rate and warmup, of which some are None in `given`; and why.

    Raises:
        InputError: if the checkpoint cannot be loaded, or is a run's folder.
    """
    options = dict(given)
    notes: list[str] = []
    check_no_run(init_from)
    config = load_config(init_from)
    if options["objective"] is None:
        pairs = has_next_sentence_head(init_from)
        options["objective"] = "mlm+nsp" if pairs else "mlm"
        has = "has a next-sentence head" if pairs else "has no next-sentence head"
        notes.append(f"--objective {options['objective']}: {init_from} {has}")
    if options["phases"] is None:
        most = config.max_position_embeddings
        short, long = (min(length, most) for length in _LENGTHS)
        phases = ((short, _SHARE), (long, round(1 - _SHARE, 6))) if short < long else ((short, 1.0),)
        options["phases"] = phases
        written = ",".join(f"{length}:{share:g}" for length, share in phases)
        notes.append(f"--phases {written}: the model takes {most:,} tokens")
    if options["steps"] is None:
        a_step = sum(share * tokens_a_step(sampling, length) for length, share in options["phases"])
        epochs = max(1, round(EPOCHS * store.tokens / a_step))
        options["steps"] = min(STEPS, epochs)
        why = "for going on" if epochs >= STEPS else f"{EPOCHS} times the corpus, less than {STEPS:,} steps"
        notes.append(f"--steps {options['steps']}: {why}")
    if options["learning_rate"] is None:
        options["learning_rate"] = LEARNING_RATE
        notes.append(f"--learning-rate {LEARNING_RATE:g}: half of what a new model gets")
    if options["warmup"] is None:
        options["warmup"] = round(WARMUP * options["steps"])
        notes.append(f"--warmup {options['warmup']}: {WARMUP:.0%} of the steps")
    return options, notes
