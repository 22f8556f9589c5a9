"""The Hugging Face hub, which a machine may not reach: asked once, by all that loads from it."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from huggingface_hub.errors import EntryNotFoundError

from fastbert import hub
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


def test_files_of_a_model_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is not there is None; a folder is fetched alone."""

    def download(name: str, file: str, *, local_files_only: bool) -> str:
        if file != "modules.json":
            raise EntryNotFoundError(file)
        return f"/cache/{name}/{file}"

    def snapshot(name: str, *, allow_patterns: str, local_files_only: bool) -> str:
        return f"/cache/{name} for {allow_patterns}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.find("some/thing", "modules.json", local=False) == Path("/cache/some/thing/modules.json")
    assert hub.find("some/thing", "nothing.json", local=True) is None
    assert hub.subfolder("some/thing", "0_BERT", local=False) == "/cache/some/thing for 0_BERT/*/0_BERT"
    assert hub.find(str(tmp_path), "modules.json", local=True) is None
    assert hub.subfolder(str(tmp_path), "0_BERT", local=True) == str(tmp_path / "0_BERT")
