"""What is said on the logger `fastbert` of calls that fall back, or do more than they need: the first of a kind, with
what can be done."""

import logging

from torch import nn

_LOGGER = logging.getLogger("fastbert")
MASKED_WORDS = "attention_mask is 0 where input_ids are not pad_token_id"
# By what a reason begins with. None: no other way is there, so that whoever calls it so wants it so.
_ADVICE: dict[str, str | None] = {
    "output_attentions": "Packed attention keeps no probabilities: ask for attentions only where you read them.",
    "an attention_mask that is not 2-D": "Give it a mask of (batch, length), as tokenizers make it.",
    "a decoder that returns a cache": "Pass use_cache=False where you do not generate.",
    "cross-attention or a cache": "Leave past_key_values out where you do not generate.",
    MASKED_WORDS: 'Fill up with pad_token_id; or patch(model, padded_rows="zeros") has zeros for all masked tokens,'
    ' padded_rows="computed" these values without a word.',
    "labels on padding": "Padding's labels are to be -100, and answers to lie in the text.",
    "the pooler reads each row's first token": 'Pad on the right: tokenizer.padding_side = "right".',
    "the head reads each row's first token": 'Pad on the right: tokenizer.padding_side = "right".',
    "a GPU of compute capability": "On this GPU nothing is gained by patching.",
    "exporting": None,
    "a transform of torch.func": None,
    "forward-mode differentiation": None,
}
_OTHER = "fastbert.report(model) says what is fused and what is not."


def say(module: nn.Module, reason: str) -> None:
    """One warning; of what was asked for, only information."""
    advice = next((advice for start, advice in _ADVICE.items() if reason.startswith(start)), _OTHER)
    what = "fell back to transformers' own forward"
    if reason.startswith(MASKED_WORDS):
        what = "computed the rows of masked tokens too, as transformers does"
    _LOGGER.log(
        logging.INFO if advice is None else logging.WARNING,
        "fastbert: a call of %s %s: %s.%s More of them are counted by fastbert.report, and not logged.",
        type(module).__name__,
        what,
        reason,
        f" {advice}" if advice else "",
    )
