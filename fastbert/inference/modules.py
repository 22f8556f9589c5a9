"""What stands behind an encoder in a sentence-transformers folder, on packed tokens and on pooled vectors.

Dimension key:  B texts   T packed tokens   N features
"""

import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastbert.errors import InputError
from fastbert.inference.engine import Batch
from fastbert.inference.folder import Folder, ModuleFiles

Module = TypeVar("Module", bound=nn.Module)

POOLS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_OLD_POOLS = {  # one flag each, in the order in which their vectors are joined
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Pooling(nn.Module):
    """One vector a text from the hidden states of its tokens, for each mode; joined where there are several.

    Args:
        modes: of POOLS, one at least.
        include_prompt: whether a prompt's tokens take part.

    Raises:
        InputError: if a mode is none of these.
    """

    def __init__(self, modes: Sequence[str], include_prompt: bool = True) -> None:
        super().__init__()
        for mode in modes or ("",):
            if mode not in POOLS:
                raise InputError(f"pool must be one of {', '.join(POOLS)}, or several of them, but is {mode!r}")
        self.modes, self.include_prompt = tuple(modes), include_prompt

    def forward(self, hidden_TN: Tensor, batch: Batch) -> Tensor:
        """(T, N) to (B, modes x N) float32, in the order of the batch. Nothing waits for a GPU."""
        hidden_TN = hidden_TN.float()
        starts, ends = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
        seqlens = ends - starts
        skipped = 0 if self.include_prompt else batch.prompt
        if not skipped:
            segments, kept = seqlens, slice(None)
        else:  # each text is two segments, its prompt and the rest
            head = seqlens.clamp(max=skipped)
            segments, kept = torch.stack([head, seqlens - head], 1).flatten(), slice(1, None, 2)
        segments = segments.long()

        def reduced(values_TN: Tensor, how: str) -> Tensor:
            # segment_reduce, for it adds in a fixed order; unsafe=True leaves out a check that would synchronise.
            return torch.segment_reduce(values_TN, how, lengths=segments, axis=0, unsafe=True)[kept]

        counts_B1 = segments[kept, None].float().clamp(min=1)
        pooled = []
        for mode in self.modes:
            if mode == "cls":
                pooled.append(hidden_TN[starts + torch.where(seqlens > skipped, skipped, 0)])
            elif mode == "lasttoken":
                last_BN = hidden_TN[ends - 1]
                pooled.append(torch.where((seqlens > skipped)[:, None], last_BN, 0.0) if skipped else last_BN)
            elif mode == "max":
                pooled.append(reduced(hidden_TN, "max"))
            elif mode == "weightedmean":  # by a token's place in the text, from 1
                token = torch.arange(len(hidden_TN), device=hidden_TN.device)
                places_T = 1 + token - starts[torch.searchsorted(ends, token, right=True)]
                weights_T1 = places_T[:, None].float()
                pooled.append(reduced(hidden_TN * weights_T1, "sum") / reduced(weights_T1, "sum").clamp(min=1))
            else:
                pooled.append(reduced(hidden_TN, "sum") / (counts_B1 if mode == "mean" else counts_B1.sqrt()))
        return torch.cat(pooled, 1) if len(pooled) > 1 else pooled[0]


class Normalize(nn.Module):
    """Vectors of length 1."""

    def forward(self, x_BN: Tensor) -> Tensor:
        return F.normalize(x_BN, dim=-1)


class Truncate(nn.Module):
    """The first elements of a vector."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension

    def forward(self, x_BN: Tensor) -> Tensor:
        return x_BN[:, : self.dimension]


class Dense(nn.Module):
    """A product, an activation, and where asked for what came in, added."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, activation_function: nn.Module, use_residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)
        self.activation_function = activation_function
        self.use_residual = use_residual
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x_BN: Tensor) -> Tensor:
        y_BN = cast(Tensor, self.activation_function(self.linear(x_BN)))
        if not self.use_residual:
            return y_BN
        return y_BN + (self.residual(x_BN) if hasattr(self, "residual") else x_BN)


class Norm(nn.Module):
    """A LayerNorm."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, x_BN: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x_BN))


def load_modules(folder: Folder, hidden_size: int) -> tuple[Pooling, nn.Sequential]:
    """The pooling of a folder, and what its vectors go through, in float32.

    Raises:
        InputError: naming the module, if fastbert does not know it, it does not fit what comes before it, or its
            weights are missing, damaged or of another size.
    """
    (first, *others) = folder.modules or (ModuleFiles("nothing", "", {}),)
    if first.kind != "Pooling":
        raise InputError(f"{folder.name}/modules.json has {first.kind} behind the Transformer, and not Pooling")
    pooling = _pooling(folder, first)
    _check_size(folder, first, ("embedding_dimension", "word_embedding_dimension"), hidden_size)
    size = hidden_size * len(pooling.modes)
    loaded: list[nn.Module] = []
    for files in others:
        if files.config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
            raise InputError(f"{folder.name}/{files.path} is for {files.config['module_input_name']}, not for vectors")
        if files.kind == "Dense":
            loaded.append(_dense(folder, files, size))
            size = int(files.config["out_features"])
        elif files.kind == "LayerNorm":
            _check_size(folder, files, ("dimension",), size)
            loaded.append(_with_weights(folder, files, Norm(size)))
        elif files.kind == "Normalize":
            loaded.append(Normalize())
        elif files.kind != "Dropout":  # which does nothing here
            raise InputError(
                f"{folder.name}/modules.json has {files.kind}, which fastbert does not know: it knows Transformer,"
                " Pooling, Dense, LayerNorm, Normalize and Dropout"
            )
    return pooling, nn.Sequential(*loaded)


def describe(modules: Iterable[nn.Module]) -> list[str]:
    """A word for each."""
    words: dict[type[nn.Module], Callable[[Any], str]] = {
        Dense: lambda m: (
            f"Dense {m.linear.in_features} to {m.linear.out_features} with {type(m.activation_function).__name__}"
            + (" and residual" if m.use_residual else "")
        ),
        Norm: lambda m: "LayerNorm",
        Normalize: lambda m: "length 1",
        Truncate: lambda m: f"the first {m.dimension}",
        Pooling: lambda m: " + ".join(m.modes) + ("" if m.include_prompt else " without the prompt"),
    }
    return [words[type(module)](module) for module in modules]


def _pooling(folder: Folder, files: ModuleFiles) -> Pooling:
    config = files.config
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _OLD_POOLS.items() if config.get(flag)] or ["mean"]
    try:
        return Pooling([modes] if isinstance(modes, str) else modes, config.get("include_prompt", True))
    except InputError as error:
        raise InputError(f"{folder.name}/{files.path}: {error}") from error


def _dense(folder: Folder, files: ModuleFiles, size: int) -> Dense:
    config = files.config
    _check_size(folder, files, ("in_features",), size)
    _check_size(folder, files, ("out_features",), None)
    name = config.get("activation_function", "torch.nn.Tanh")
    activation = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    try:
        function = cast(Any, activation)()
    except TypeError:
        function = None
    if not isinstance(function, nn.Module):
        raise InputError(f"{folder.name}/{files.path}: {name} is no activation that fastbert knows")
    made = Dense(size, config["out_features"], config.get("bias", True), function, config.get("use_residual", False))
    return _with_weights(folder, files, made)


def _check_size(folder: Folder, files: ModuleFiles, keys: Sequence[str], size: int | None) -> None:
    """Raises: InputError, if config.json has no such number, or another than what comes in."""
    found = next((files.config[key] for key in keys if key in files.config), None)
    if not isinstance(found, int):
        raise InputError(f"{folder.name}/{files.path}/config.json has no {keys[0]}")
    if size is not None and found != size:
        raise InputError(f"{folder.name}/{files.path} takes vectors of {found}, but what comes before it gives {size}")


def _with_weights(folder: Folder, files: ModuleFiles, module: Module) -> Module:
    safe, old = (folder.find(f"{files.path}/{name}") for name in ("model.safetensors", "pytorch_model.bin"))
    path = safe or old
    if path is None:
        raise InputError(f"{folder.name}/{files.path} has no weights: neither model.safetensors nor pytorch_model.bin")
    try:
        weights = load_file(path) if path == safe else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is damaged or cut off ({str(error).splitlines()[0]})") from error
    try:
        module.load_state_dict({name: weight.float() for name, weight in weights.items()})
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit its config.json: {' '.join(str(error).splitlines()[1:]).strip()}"
        ) from error
    return module.eval()
