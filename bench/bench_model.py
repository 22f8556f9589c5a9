"""Whole models: inference, and a training step of forward, backward and fused AdamW, against transformers.

Every model starts from the same weights and gets the same batch. Inference is the encoder; training is BERT's own, with
masked-LM and next-sentence heads and 15 % of the tokens labelled, and masked LM alone for the other families, whose
cases are named by a size and the family: "MiniLM roberta". FLOPs are counted on fastbert's step, by PyTorch's
formulas and those that fastbert registers: what padding costs is nobody's merit. "autocast" is float32 weights under
bfloat16 autocast. A provider may be off from float32 by twice what transformers is off by in that dtype; training is
compared on the first sequences of the batch, for float32 takes twice the memory.

"transformers SDPA" is attention by PyTorch's own choice of backend, "cuDNN" by cuDNN's wherever that has a kernel.
"CUDA graph" is one for the very tensors that are timed, which the bench replays: the floor; "graphs" are those of
`fastbert.graphs`, as a user has them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForMaskedLM, BertForPreTraining, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import fastbert
from bench.harness import Bench, NotApplicableError, Ready, compiled, disagreement, largest_error
from bench.record import OURS, Work
from bench.shapes import MODELS, VOCABULARY, batch_of
from fastbert import reference_encoder
from fastbert.packing import Packing

LABELLED = 0.15
COMPARED = 8  # sequences
Batch = dict[str, Tensor]


def case_of(
    model: str, step: str, batch: int, S: int, lengths: str, dtype: str, dropout: float | None = None
) -> dict[str, Any]:
    """In training dropout is 0.1, as BERT's is."""
    dropout = (0.1 if step == "training" else 0.0) if dropout is None else dropout
    return {
        "model": model,
        "step": step,
        "batch": batch,
        "S": S,
        "lengths": lengths,
        "dtype": dtype,
        "dropout": dropout,
    }


SMALLEST = [
    case_of("tiny", "inference", 3, 16, "wikipedia", "float32"),
    case_of("tiny", "training", 3, 16, "wikipedia", "float32"),
    case_of("tiny", "training", 2, 16, "full", "bfloat16", 0.0),
    case_of("tiny roberta", "training", 2, 16, "wikipedia", "float32"),
    case_of("tiny distilbert", "inference", 3, 16, "wikipedia", "float32"),
]
FAMILIES = ("albert", "distilbert", "electra", "ernie", "roberta", "roberta-prelayernorm", "xlm-roberta-xl")
_SEQUENCES = ((128, "full"), (512, "wikipedia"), (384, "squad"), (512, "full"), (384, "full"), (128, "wikipedia"))
GOALS = {
    "cuda": [
        *(case_of(model, "training", 64, 512, "wikipedia", "bfloat16") for model in ("large", "base")),
        *(case_of(model, "training", 256, 128, "full", "bfloat16") for model in ("large", "base")),
        *(case_of(model, "inference", 256, 128, "full", "bfloat16") for model in ("large", "base")),
        *(case_of(model, "inference", 1, 128, "full", "bfloat16") for model in ("large", "base")),
        *(case_of(model, "inference", 128, 384, "squad", "bfloat16") for model in ("base", "MiniLM")),
    ]
}
CASES = {
    "cpu": [
        case_of("MiniLM", "inference", 16, 384, "squad", "float32"),
        case_of("MiniLM", "inference", 16, 384, "squad", "bfloat16"),
        case_of("MiniLM", "inference", 16, 512, "wikipedia", "float32"),
        *(case_of("MiniLM", "inference", 16, S, "full", "float32") for S in (128, 384, 512)),
        *(case_of("MiniLM", "inference", batch, 128, "full", "float32") for batch in (1, 8)),
        case_of("base", "inference", 8, 384, "squad", "float32"),
        case_of("base", "inference", 8, 384, "squad", "bfloat16"),
        case_of("base", "inference", 1, 128, "full", "float32"),
        case_of("MiniLM", "training", 8, 512, "wikipedia", "float32"),
        case_of("MiniLM", "training", 8, 512, "wikipedia", "bfloat16"),
        case_of("MiniLM", "training", 8, 128, "full", "float32"),
        case_of("base", "training", 4, 384, "squad", "bfloat16"),
        *(
            case_of(f"MiniLM {family}", step, batch, S, lengths, "float32")
            for family in FAMILIES
            for step, batch, S, lengths in (
                ("inference", 8, 512, "wikipedia"),
                ("training", 4, 512, "wikipedia"),
                ("inference", 8, 128, "full"),
                ("training", 8, 128, "full"),
            )
        ),
    ],
    "cuda": [
        *GOALS["cuda"],
        *(
            case_of(model, step, 32768 // S, S, lengths, "bfloat16")
            for (S, lengths), step, model in product(_SEQUENCES, ("inference", "training"), ("base", "large", "MiniLM"))
        ),
        *(
            case_of(model, "inference", batch, 128, "full", "bfloat16")
            for model, batch in product(("base", "large", "MiniLM"), (1, 8, 32, 64, 128))
        ),
        *(case_of(model, "training", 64, 512, "wikipedia", "autocast") for model in ("base", "large")),
        *(case_of(model, step, 64, 512, "wikipedia", "float16") for model, step in product(("base",), ("inference",))),
    ],
}


def test_model(case: dict[str, Any], bench: Bench) -> None:
    sequences = batch_of(case["lengths"], case["batch"], case["S"])
    work = Work(tokens=sum(sequences), sequences=len(sequences))
    bench.steps("model", case, _providers(case, bench, work), work)


def _providers(case: dict[str, Any], bench: Bench, work: Work) -> dict[str, Callable[[], Ready]]:
    device, inference = bench.device, case["step"] == "inference"
    batch = make_batch(case, device)
    check = cache(partial(Check, case, batch, device))

    def ready(
        attention: str,
        *,
        patch: bool = False,
        cudnn: bool = False,
        compile: bool | None = None,
        graph: bool = False,
        graphs: bool = False,
        counts: bool = False,
    ) -> Ready:
        counted = replace(work, flops=_count_flops(case, batch, device)) if counts else None
        model = make_model(case, device, attention=attention)
        if patch:
            fastbert.patch(model, strict=True)
        if graphs:
            fastbert.graphs(model)
        call: Any = model if compile is None else compiled(model, dynamic=compile)
        call = prefer_cudnn(call) if cudnn else call
        wrong = check().wrong(model, call)
        return Ready([make_step(case, model, batch, call)], wrong, graph, only=graph, work=counted)

    def plain() -> Ready:
        if not inference:
            raise NotApplicableError("the reference has no heads")
        model = make_model(case, device)
        call = specification(model)
        return Ready([make_step(case, model, batch, call)], check().wrong(model, call))

    providers = {OURS: lambda: ready("sdpa", patch=True, counts=True), "transformers SDPA": lambda: ready("sdpa")}
    if device == "cuda":
        providers["transformers SDPA, cuDNN"] = lambda: ready("sdpa", cudnn=True)
    if _family(case) != "bert":  # of the others only what a user would have otherwise
        return providers
    goal = device == "cuda" and not bench.compiles
    if not (goal and case["model"] == "large"):  # whose probabilities are 40 GB of a training step
        providers["transformers eager"] = lambda: ready("eager")
    if not goal:
        providers["reference"] = plain
    if device == "cuda" and inference and case["batch"] <= 8 and case["lengths"] == "full":
        providers[f"{OURS}, graphs"] = lambda: ready("sdpa", patch=True, graphs=True)
        providers[f"{OURS}, CUDA graph"] = lambda: ready("sdpa", patch=True, graph=True)
        providers["transformers SDPA, CUDA graph"] = lambda: ready("sdpa", graph=True)
    if bench.compiles and (device == "cuda" or (inference and case["model"] == "MiniLM")):
        providers["transformers SDPA, compiled"] = lambda: ready("sdpa", compile=False)
        if device == "cuda" or case["batch"] <= 8:
            providers["transformers SDPA, compiled dynamic"] = lambda: ready("sdpa", compile=True)
    return providers


class Check:
    """What a model must compute, from transformers in float32; before it is trained, and without dropout."""

    def __init__(self, case: dict[str, Any], batch: Batch, device: str) -> None:
        self._batch = batch if case["step"] == "inference" else {name: t[:COMPARED] for name, t in batch.items()}
        self._case = case
        model = make_model(case, device, wide=True)
        self._expected = self._results(model, model, "float32")
        model = make_model(case, device)
        stock = self._results(model, model, case["dtype"])
        self._tolerance = 1e-3 + 2 * largest_error(stock, self._expected)

    def wrong(self, model: PreTrainedModel, call: Callable[..., Any]) -> str | None:
        return disagreement(self._results(model, call, self._case["dtype"]), self._expected, self._tolerance)

    def _results(self, model: PreTrainedModel, call: Callable[..., Any], dtype: str) -> tuple[Tensor, ...]:
        """Hidden states of real tokens; or the loss, and gradients from both ends of the model."""
        if self._case["step"] == "inference":
            hidden = make_step(self._case, model, self._batch, call)()
            return (hidden[self._batch["attention_mask"].bool()] if "attention_mask" in self._batch else hidden,)
        with _without_dropout(model), _autocast(dtype, self._batch):
            loss = call(**self._batch).loss
        loss.backward()
        values = next(p for name, p in model.named_parameters() if name.endswith(("value.weight", "v_lin.weight")))
        ends = values, model.get_output_embeddings().bias
        gradients = [p.grad.clone() for p in ends]
        model.zero_grad(set_to_none=True)
        return loss.detach(), *gradients


def make_model(
    case: dict[str, Any], device: str, *, attention: str = "sdpa", wide: bool = False, layers: int | None = None
) -> PreTrainedModel:
    """The case's model with weights that are the same every time; in float32 where `wide`; or with so many layers."""
    config = make_config(case, layers)
    config._attn_implementation = attention
    training = case["step"] == "training"
    torch.manual_seed(0)
    with torch.device(device):
        if training:
            model = BertForPreTraining(config) if _family(case) == "bert" else AutoModelForMaskedLM.from_config(config)
        else:
            model = AutoModel.from_config(config)
            model.pooler = None
    dtype = torch.float32 if wide or case["dtype"] == "autocast" else getattr(torch, case["dtype"])
    return model.to(dtype).train(training)


def make_config(case: dict[str, Any], layers: int | None = None) -> Any:
    """Of the case's family, in its size."""
    family, size = _family(case), case["model"].split()[0]
    usual, hidden, heads = MODELS.get(size, (2, 64, 2))
    of = CONFIG_MAPPING[family]
    changes = {
        "vocab_size": VOCABULARY if size in MODELS else 100,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "hidden_dim": 4 * hidden,  # DistilBERT's
        "num_attention_heads": heads,
        "num_hidden_layers": usual if layers is None else layers,
        "max_position_embeddings": 514 if "roberta" in family else 512,  # the first two are for padding
        **dict.fromkeys(_DROPOUTS, case["dropout"]),
    }
    known = of()
    return of(**{name: value for name, value in changes.items() if hasattr(known, name)})


_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


def _family(case: dict[str, Any]) -> str:
    return case["model"].partition(" ")[2] or "bert"


def make_batch(case: dict[str, Any], device: str) -> Batch:
    """What a tokenizer and a collator give: padded; an attention mask only where there is padding."""
    B, S = case["batch"], case["S"]
    lengths = torch.tensor(batch_of(case["lengths"], B, S))
    mask = torch.arange(S) < lengths[:, None]
    generator = torch.Generator().manual_seed(0)
    config = make_config(case)
    ids = torch.randint(2, config.vocab_size, (B, S), generator=generator).where(mask, config.pad_token_id)
    batch = {"input_ids": ids}
    if not mask.all():
        batch["attention_mask"] = mask.long()
    if case["step"] == "training":
        labelled = (torch.rand(B, S, generator=generator) < LABELLED) & mask
        labelled[:, 0] = True  # at least one a sequence
        batch["labels"] = ids.where(labelled, -100)
        if _family(case) == "bert":
            batch["next_sentence_label"] = torch.randint(0, 2, (B,), generator=generator)
    return {name: t.to(device) for name, t in batch.items()}


def make_step(
    case: dict[str, Any], model: PreTrainedModel, batch: Batch, call: Callable[..., Any] | None = None
) -> Callable[[], Any]:
    """Inference: the last hidden state. Training: a whole optimizer step, and its loss."""
    call = model if call is None else call
    if case["step"] == "inference":

        def inference() -> Tensor:
            with torch.inference_mode(), _autocast(case["dtype"], batch):
                return call(**batch).last_hidden_state

        return inference

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def training() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(case["dtype"], batch):
            loss = call(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return training


def prefer_cudnn(call: Callable[..., Any]) -> Callable[..., Any]:
    """Where cuDNN has no kernel PyTorch takes what comes next. The backward is of the backend that ran the forward."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def preferring(**batch: Tensor) -> Any:
        with sdpa_kernel(order, set_priority=True):
            return call(**batch)

    return preferring


def specification(model: PreTrainedModel) -> Callable[..., BaseModelOutput]:
    """The specification with a model's weights, called like the model."""
    weights = model.state_dict()

    def call(input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        if attention_mask is None:
            packing = Packing.full(*input_ids.shape, device=input_ids.device)
        else:
            packing = Packing.from_mask(attention_mask)
        ids = packing.pack(input_ids)
        hidden = reference_encoder.encoder(
            weights,
            ids,
            torch.zeros_like(ids),
            packing.position_ids,
            packing.cu_seqlens,
            num_heads=model.config.num_attention_heads,
            eps=model.config.layer_norm_eps,
        )
        return BaseModelOutput(packing.unpack(hidden[-1]))

    return call


def _autocast(dtype: str, batch: Batch) -> Any:
    if dtype != "autocast":
        return contextlib.nullcontext()
    return torch.autocast(batch["input_ids"].device.type, torch.bfloat16)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    dropouts = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module in dropouts:
        module.p = 0.0
    yield
    for module, p in dropouts.items():
        module.p = p


def _count_flops(case: dict[str, Any], batch: Batch, device: str) -> int:
    model = fastbert.patch(make_model(case, device), strict=True)
    with FlopCounterMode(display=False) as counter, _autocast(case["dtype"], batch):
        if case["step"] == "training":
            model(**batch).loss.backward()
        else:
            with torch.no_grad():
                model(**batch)
    return int(counter.get_total_flops())
