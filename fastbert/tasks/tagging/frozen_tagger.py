"""Entities by a BiLSTM over a frozen encoder, as `fastbert finetune ner --features` trains it.

Dimension key:  T tokens that are read   M words   C classes
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.inference.engine import Progress
from fastbert.inference.loading import load_packed, load_tokenizer
from fastbert.inference.tagger import Tagger
from fastbert.inference.windows import Windows
from fastbert.tasks.tagging.frozen import WordLSTM, config_of, layers_of, logits, vectors
from fastbert.tasks.tagging.words import tokenizer_of_words


class FrozenTagger(Tagger):
    """`Tagger` whose labels are a BiLSTM's, of what a bare encoder makes of each word's first token.

    Args:
        lstm: over the encoder's hidden states.
        options: of `Tagger`; the strategy is "first".
    """

    _auto: ClassVar[Any] = AutoModel
    _head = ""  # none is needed

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lstm: WordLSTM, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, **{**options, "strategy": "first"})
        self._lstm = lstm.to(model.device)

    @staticmethod
    def config(name: str) -> Any:
        """The encoder's, with the tags as its labels, of the BiLSTM in that folder."""
        return config_of(WordLSTM.load(Path(name)).about)

    @classmethod
    def from_pretrained(
        cls, name: str, *, dtype: torch.dtype | str = "fp32", device: torch.device | str = "cpu", **options: Any
    ) -> "FrozenTagger":
        """From the folder of a BiLSTM, and from the encoder that it names.

        Raises:
            InputError: as `WordLSTM.load`, `load_packed` and `load_tokenizer`.
        """
        lstm = WordLSTM.load(Path(name))
        encoder = lstm.about.encoder
        model = load_packed(AutoModel, encoder, dtype=dtype, device=device)
        return cls(model, tokenizer_of_words(load_tokenizer(encoder)), lstm, **options)

    @property
    def labels(self) -> list[str]:
        return list(self._lstm.about.labels)

    def _probabilities(
        self, tokens: Windows, firsts: npt.NDArray[np.bool_], progress: Progress | None
    ) -> npt.NDArray[np.float32]:
        """(T, C), zeros but at the first token of each word, which is all that the strategy reads."""
        at = np.flatnonzero(tokens.read)[firsts]
        layers = layers_of(self._lstm.about.features, self.model.config)
        read = vectors(self, tokens, layers, progress or (lambda count: None), at)
        probabilities_TC = np.zeros((len(firsts), len(self.labels)), np.float32)
        probabilities_TC[firsts] = torch.from_numpy(logits(self._lstm, read)).softmax(-1).numpy()
        return probabilities_TC
