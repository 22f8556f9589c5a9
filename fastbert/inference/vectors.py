"""What the engines share that give vectors of texts: settings from a model's own files, prompts, similarity.

Dimension key:  A, B texts   N elements
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.families._base import max_tokens
from fastbert.inference.engine import Engine, Progress
from fastbert.inference.folder import Folder, read_folder
from fastbert.inference.loading import load_packed, load_tokenizer
from fastbert.inference.tokens import Tokens

Own = TypeVar("Own", bound="VectorEngine")


class VectorEngine(Engine):
    """An engine that gives vectors.

    Args:
        model: the name of a checkpoint in a directory or on the Hugging Face hub; or a model that is one of fastbert's
            or patched, in eval mode.
        tokenizer: of a model that is given itself.
        prompt: the name of the model's prompt for texts that come without one.
        max_length: tokens a text is cut to, prompt included; what the model's files say where it is None.
        dtype, device: for a name: float32 on the CPU where they are None; a dtype of PyTorch's, or a name of
            `fastbert.inference.precision`: "auto", "int8", ...
        options: of `Engine`.

    Attributes:
        folder: what the model's own files say.
        prompts: texts to put before others, by name.
        similarity_fn_name: what `similarity` computes.

    Raises:
        InputError: if the model cannot be loaded or was not made for this, or an option is out of range.
    """

    kind: ClassVar[str]  # of folder
    auto: ClassVar[Any]  # transformers' class that loads it
    may_miss: ClassVar[Sequence[str]] = ("pooler.",)
    default_similarity: ClassVar[str] = "cosine"

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, str | os.PathLike):
            if tokenizer is not None:
                raise InputError("a model that is named brings its tokenizer: give the name alone")
            self.folder = read_folder(os.fspath(model), self.kind)
            model = load_packed(
                self.auto,
                self.folder.transformer,
                dtype=dtype,
                device=device or "cpu",
                may_miss=self.may_miss,
            )
            tokenizer = load_tokenizer(self.folder.transformer)
        else:
            self.folder = Folder()
            if tokenizer is None or dtype is not None or device is not None:
                raise InputError("a model that is loaded needs its tokenizer, and has its dtype and device")
        longest = self.folder.max_length
        if longest is not None:
            tokenizer.model_max_length = max(tokenizer.model_max_length, longest)
            max_length = min(longest, max_tokens(model)) if max_length is None else max_length
        if self.folder.lower_case:
            lower_case(tokenizer)
        super().__init__(model, tokenizer, max_length=max_length, **options)
        self.prompts = self.folder.prompts
        self.prompt = self.folder.prompt if prompt is None else prompt
        self._prompt_text(None, None)
        self.similarity_fn_name = self.folder.similarity or self.default_similarity
        self._prompt_tokens: dict[str, int] = {}

    @classmethod
    def from_pretrained(
        cls: type[Own],
        name: str,
        *,
        dtype: torch.dtype | str = "fp32",
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Own:
        """From a directory or the Hugging Face hub: the class, by the name that transformers' classes give this.

        Raises:
            InputError: as the class.
        """
        return cls(name, dtype=dtype, device=device, **options)

    def tokenize(
        self,
        texts: Iterable[str],
        progress: Progress | None = None,
        *,
        prompt: str | None = None,
        prompt_text: str | None = None,
    ) -> Tokens:
        """Texts to ids, special tokens included, cut at `max_length`.

        Args:
            texts: a list, an iterator, a column of Arrow, pandas or datasets: anything that gives strings.
            progress: called with the number of texts that have just been done.
            prompt: the name of the model's prompt to put before each; its own default where it is None.
            prompt_text: a prompt itself, "" for none.

        Raises:
            InputError: if that is one string, or something in it is no string; if there is no such prompt; if an id is
                not in the model's vocabulary.
        """
        before = self._prompt_text(prompt, prompt_text)
        strings = as_texts(texts)
        if not before:
            return super().tokenize(strings, progress)
        tokens = super().tokenize([before + text for text in strings], progress)
        return replace(tokens, prompt=self._length_of_prompt(before))

    def _prompt_text(self, prompt: str | None, prompt_text: str | None) -> str:
        if prompt_text is not None:
            if prompt is not None:
                raise InputError("give prompt, a name, or prompt_text, but not both")
            return prompt_text
        name = self.prompt if prompt is None else prompt
        if name is None:
            return ""
        if name not in self.prompts:
            raise InputError(f"the model has no prompt {name!r}, but {', '.join(map(repr, self.prompts))}")
        return self.prompts[name]

    def _length_of_prompt(self, text: str) -> int:
        """Its tokens, with the special ones that begin a text."""
        if text not in self._prompt_tokens:
            ids = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
            self._prompt_tokens[text] = len(ids) - (ids[-1] in self.tokenizer.all_special_ids)
        return self._prompt_tokens[text]

    def _settings(self) -> str:
        """What holds for all texts, in words."""
        prompts = [
            f"{name} {text!r}" + (" by default" if name == self.prompt else "")
            for name, text in self.prompts.items()
            if text
        ]
        return "; ".join([f"at most {self.max_length} tokens", *(["prompts " + ", ".join(prompts)] if prompts else [])])


def as_texts(texts: Iterable[Any]) -> list[str]:
    """All strings of a list, an iterator, or a column of Arrow, pandas or datasets.

    Raises:
        InputError: if that is one string or no column of strings, saying where something else is.
    """
    if isinstance(texts, str | bytes | Mapping):
        what = "one string" if isinstance(texts, str) else f"of type {type(texts).__name__}"
        raise InputError(f"texts must be a list or another iterable of strings, but is {what}")
    try:
        strings = list(texts.to_pylist() if hasattr(texts, "to_pylist") else texts)
    except TypeError as error:
        raise InputError(f"texts must be a list or another iterable of strings, but is {texts!r}") from error
    for i, text in enumerate(strings):
        if not isinstance(text, str):
            raise InputError(f"texts must be strings, but number {i} is of type {type(text).__name__}")
    return strings


def similarity(name: str, a_AN: npt.ArrayLike, b_BN: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """(A, B) float32, higher for what is closer: distances are negative.

    Args:
        name: of `folder.SIMILARITIES`.
        a_AN, b_BN: vectors, or one alone, (N,).
    """
    a, b = (torch.from_numpy(np.atleast_2d(np.asarray(x, np.float32))) for x in (a_AN, b_BN))
    if name == "cosine":
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    scores = a @ b.T if name in ("cosine", "dot") else -torch.cdist(a, b, p=1.0 if name == "manhattan" else 2.0)
    return scores.numpy()


def lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let it lower-case texts, whatever else it does. Raises: InputError, if it has no backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"do_lower_case cannot be set for a {type(tokenizer).__name__}, which has no tokenizer.json")
    backend.normalizer = Normalizers([Lowercase(), *([] if backend.normalizer is None else [backend.normalizer])])
