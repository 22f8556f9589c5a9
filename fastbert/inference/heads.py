"""What the engines for models with a head share: a checkpoint that has one."""

from typing import Any, ClassVar, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.engine import Engine
from fastbert.inference.loading import load_config, load_packed, load_tokenizer

Self = TypeVar("Self", bound="HeadEngine")


class HeadEngine(Engine):
    """An engine for models of one head.

    Attributes:
        _auto: transformers' class that loads them.  _head: the end of their classes' names.

    Raises:
        InputError: if the model has another head.
    """

    _auto: ClassVar[Any]
    _head: ClassVar[str]

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        self._check_head(type(model).__name__)
        super().__init__(model, tokenizer, **options)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str,
        *,
        dtype: torch.dtype | str = "fp32",
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Self:
        """From a directory or the Hugging Face hub; `options` are those of the class.

        Args:
            dtype: PyTorch's, or a name of `fastbert.inference.precision`: "auto", "int8", ...

        Raises:
            InputError: if the checkpoint lacks the head, which would be random; see `load_model`, `load_tokenizer`.
        """
        return cls(*cls._load(name, dtype, device), **options)

    @classmethod
    def _load(
        cls, name: str, dtype: torch.dtype | str, device: torch.device | str
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        for architecture in load_config(name).architectures or ():
            cls._check_head(architecture, f"{name} holds ")
        return load_packed(cls._auto, name, dtype=dtype, device=device, may_miss=()), load_tokenizer(name)

    @classmethod
    def _check_head(cls, architecture: str, before: str = "") -> None:
        if not architecture.endswith(cls._head):
            raise InputError(
                f"{before}{architecture}, but {cls.__name__} needs a ...{cls._head}: its head would be random"
            )

    @property
    def labels(self) -> list[str]:
        """The names of the model's classes, by their index."""
        config: Any = self.model.config
        return [str(config.id2label[i]) for i in range(config.num_labels)]
