"""The Hugging Face hub, which a machine may not reach: asked once, by all that loads from it."""

from collections.abc import Callable

import huggingface_hub
import pytest
import transformers

from fastbert.data import vocabulary
from fastbert.errors import InputError
from fastbert.inference import loading

LOADERS = [loading.load_config, loading.load_tokenizer, vocabulary.load_tokenizer]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub was asked for; nobody reaches it."""
    names: list[str] = []

    def model_info(name: str, timeout: float) -> None:
        names.append(name)
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    return names


@pytest.mark.parametrize("load", LOADERS)
def test_one_line_after_one_question(load: Callable[[str], object], asked: list[str]) -> None:
    with pytest.raises(InputError, match=r"^nobody/nothing: no such directory, and the .* hub cannot be reached$"):
        load("nobody/nothing")
    assert asked == ["nobody/nothing"]


@pytest.mark.parametrize("load", LOADERS)
def test_what_the_cache_has_is_loaded_without_the_hub(
    load: Callable[[str], object], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def from_pretrained(name: str, *, local_files_only: bool) -> None:
        found.append(local_files_only)
        raise OSError("far enough")

    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{file}")
    with pytest.raises(InputError, match="far enough"):
        load("somebody/something")
    assert (found, asked) == ([True], ["somebody/something"])
