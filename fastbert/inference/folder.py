"""What the files of a sentence-transformers folder say: its modules, prompts, lengths and similarity."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert import hub
from fastbert.errors import InputError
from fastbert.inference.loading import load_config

DENSE, SPARSE, CROSS = "SentenceTransformer", "SparseEncoder", "CrossEncoder"
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_TASKS = {DENSE: "feature-extraction", SPARSE: "fill-mask", CROSS: "sequence-classification"}
_ENGINES = {DENSE: "Embedder", SPARSE: "SparseEmbedder", CROSS: "Reranker"}
_PROMPTS = {"query": "", "document": ""}  # sentence-transformers gives these names to every model
_HEADS = {  # the ends of a class's name, and what to use instead
    "ForSequenceClassification": "fastbert.Classifier, or fastbert.Reranker for queries with documents",
    "ForTokenClassification": "fastbert.Tagger",
    "ForQuestionAnswering": "fastbert.Answerer",
    "ForMultipleChoice": "the model itself",
}
_SETTINGS = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Of the Transformer module: read here, or of no account, for what is loaded and how is fastbert's own.
_READ = {"max_seq_length", "do_lower_case", "modality_config"}
_OF_NO_ACCOUNT = {"model_args", "model_kwargs", "unpad_inputs", "query_length", "document_length"}


@dataclass(frozen=True)
class ModuleFiles:
    """A module behind the Transformer: the name of its class, where its files are, and its config.json."""

    kind: str
    path: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """What a model's own files say.

    Attributes:
        name: of the model.  local: whether only files on this machine count.
        transformer: where transformers finds the encoder and the tokenizer.
        modules: what comes behind the encoder; None for a bare checkpoint, without modules.json.
        max_length: tokens a text is cut to; None for what model and tokenizer can take.
        lower_case: whether texts are lower-cased, whatever the tokenizer does.
        prompts: texts to put before others, by name.  prompt: the name of the one that is used where none is named.
        similarity: "cosine", "dot", "euclidean" or "manhattan"; None for the engine's own.
        truncate_dim: elements of a vector that are kept.  max_active_dims: elements of a sparse one that are.
        activation: the class of PyTorch's that makes scores of logits.
    """

    name: str = ""
    local: bool = True
    transformer: str = ""
    modules: tuple[ModuleFiles, ...] | None = None
    max_length: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=_PROMPTS.copy)
    prompt: str | None = None
    similarity: str | None = None
    truncate_dim: int | None = None
    max_active_dims: int | None = None
    activation: str | None = None

    def find(self, file: str) -> Path | None:
        """A file of the model, or None."""
        return hub.find(self.name, file, local=self.local)


def read_folder(name: str, kind: str) -> Folder:
    """What the files of a model in a directory or on the Hugging Face hub say.

    Args:
        kind: DENSE, SPARSE or CROSS, what its user expects.

    Raises:
        InputError: if it was made for something else, such as classifying, or a file cannot be read or used.
    """
    local = hub.only_local(name, "modules.json", "config.json") if not Path(name).exists() else True
    modules = None if Path(name).is_file() else _read(name, "modules.json", local)
    if modules is None:
        if kind != CROSS:
            _refuse_heads(name)
        return Folder(name, local, name)
    about = _read(name, "config_sentence_transformers.json", local) or {}
    made_for = about.get("model_type", DENSE)
    if made_for != kind:
        instead = f": use fastbert.{_ENGINES[made_for]}" if made_for in _ENGINES else ""
        raise InputError(f"{name} is a {made_for} of sentence-transformers, no {kind}{instead}")
    try:
        (_, first, where), *others = [(str(m["idx"]), _kind(m["type"]), str(m["path"])) for m in modules]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name}/modules.json is no list of modules with idx, path and type") from error
    if first not in ("Transformer", "MLMTransformer"):
        raise InputError(f"{name}/modules.json begins with {first}, but fastbert needs a Transformer there")
    found = (_read(name, _at(where, file), local) for file in _SETTINGS)
    settings: dict[str, Any] = next(filter(None, found), {})
    _check_transformer(name, settings, _TASKS[kind])
    similarity = about.get("similarity_fn_name")
    if similarity not in (None, *SIMILARITIES):
        raise InputError(f"{name} is for similarity {similarity!r}, but fastbert knows {', '.join(SIMILARITIES)}")
    return Folder(
        name,
        local,
        hub.subfolder(name, where, local=local) if where else name,
        tuple(ModuleFiles(k, path, _read(name, _at(path, "config.json"), local) or {}) for _, k, path in others),
        settings.get("max_seq_length"),
        bool(settings.get("do_lower_case")),
        _PROMPTS | {key: text or "" for key, text in about.get("prompts", {}).items()},
        about.get("default_prompt_name"),
        similarity,
        about.get("truncate_dim"),
        about.get("max_active_dims"),
        about.get("activation_fn"),
    )


def _refuse_heads(name: str) -> None:
    for architecture in load_config(name).architectures or ():
        for end, instead in _HEADS.items():
            if architecture.endswith(end):
                raise InputError(f"{name} is a {architecture}, which was not made for vectors: use {instead}")


def _check_transformer(name: str, settings: dict[str, Any], task: str) -> None:
    """Raises: InputError, if it asks for what would change vectors and is not done here."""
    can = {
        "transformer_task": task,
        "module_output_name": "scores" if task == _TASKS[CROSS] else "token_embeddings",
        "query_expansion": None,
    }
    for key in sorted(settings.keys() - _READ - _OF_NO_ACCOUNT):
        value = settings[key]
        if value != can[key] if key in can else value not in (None, {}, {"trust_remote_code": True}):
            raise InputError(f"{name}: its Transformer has {key} {value!r}, which fastbert does not know")
    text = (settings.get("modality_config") or {}).get("text", {"method": "forward"})
    output = text.get("method_output_name", "logits" if task == "fill-mask" else "last_hidden_state")
    if text["method"] != "forward" or output not in ("last_hidden_state", "logits"):
        raise InputError(f"{name}: its Transformer reads texts by {text}, which fastbert does not know")


def _kind(type_name: str) -> str:
    """The class's name, where it is of sentence-transformers; else all of it."""
    home, _, kind = type_name.rpartition(".")
    return kind if home.split(".")[0] == "sentence_transformers" else type_name


def _at(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _read(name: str, file: str, local: bool) -> Any:
    """A JSON file, or None where there is none."""
    path = hub.find(name, file, local=local)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # which what is no UTF-8 is too
        raise InputError(f"{path} is no JSON: {error}") from error
