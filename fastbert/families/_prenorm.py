"""Layers that normalise what goes into attention and feed-forward, and not what comes out of them.

The sums between them are the hidden states, which one LayerNorm behind the last layer normalises.

Dimension key:  T packed tokens   N features
"""

from typing import Any, ClassVar, cast

from torch import Tensor

from fastbert import encoder, prepared, touched
from fastbert.encoder import Run
from fastbert.families import _layers
from fastbert.families._family import Packed, Role
from fastbert.families._layers import Fusions, Product, product
from fastbert.touched import Each, Parts, container


class ProjectAndSum(Packed):
    """The end of both halves of a layer: SelfOutput, and Output."""

    parts: ClassVar[Parts] = {"dense": touched.linear, "dropout": touched.dropout}

    def _packed(self, x: Tensor, residual_TN: Tensor, run: Run) -> Tensor:
        return encoder.project_and_sum(x, self.dense, getattr(self, "dropout", None), residual_TN)

    def fusions(self) -> Fusions:
        return [("bias + dropout + residual + LayerNorm", "the LayerNorm comes first")]

    def products(self) -> list[Product]:
        return [product(self.dense)]


class Attention(_layers.Attention):
    """Its LayerNorm comes first; `_norm` says what it is called."""

    _norm: ClassVar[str] = "LayerNorm"
    parts: ClassVar[Parts] = {
        "self": container(_layers.SelfAttention),
        "output": container(ProjectAndSum),
        "LayerNorm": touched.norm,
    }

    def _packed(self, hidden_TN: Tensor, run: Run, stream: int, rows: Tensor | None) -> Tensor:
        normalised = encoder.normalise(hidden_TN, getattr(self, self._norm), run.called)
        context = self.self(normalised, run=run, stream=stream)
        context, hidden_TN = encoder.chosen(rows, context, hidden_TN)
        return cast(Tensor, self.output(context, hidden_TN, run=run))


class Intermediate(_layers.Intermediate):
    """With the LayerNorm in front of it."""

    parts: ClassVar[Parts] = {**_layers.Intermediate.parts, "LayerNorm": touched.norm}

    def _packed(self, hidden_TN: Tensor, run: Run) -> Tensor:
        return super()._packed(encoder.normalise(hidden_TN, self.LayerNorm, run.called), run)


class Layer(_layers.Layer):
    parts: ClassVar[Parts] = {
        "attention": container(Attention),
        "intermediate": container(_layers.Intermediate),
        "output": container(ProjectAndSum),
    }

    def _packed(self, hidden_TN: Tensor, run: Run, stream: int, rows: Tensor | None) -> Tensor:
        attended = self.attention(hidden_TN, run=run, stream=stream, rows=rows)
        return cast(Tensor, self.output(self.intermediate(self._before(attended, run), run=run), attended, run=run))

    def _before(self, attended_TN: Tensor, run: Run) -> Tensor:
        """What the feed-forward begins with."""
        return attended_TN

    def _norm_before(self) -> Any:
        """The feed-forward's LayerNorm."""
        return self.intermediate.LayerNorm

    def _prepared_parts(self) -> prepared.Parts:
        attention, inner = self.attention, self.intermediate
        of: prepared.Parts = attention.self._layer_parts(
            (attention.self.query, attention.self.key, attention.self.value),
            (attention.output.dense, getattr(attention, attention._norm)),
            (inner.dense, inner.intermediate_act_fn, self.output.dense, self._norm_before()),
        )
        return of._replace(norm_first=True)

    def fusions(self) -> Fusions:
        return [("feed-forward in one operator, its GELU not kept", "the LayerNorm comes first")]


class Encoder(_layers.Encoder):
    parts: ClassVar[Parts] = {"layer": Each(container(Layer))}
    _replays = False


LAYERS: dict[str, type[Role]] = {
    **_layers.LAYERS,
    "SelfOutput": ProjectAndSum,
    "Attention": Attention,
    "Intermediate": Intermediate,
    "Output": ProjectAndSum,
    "Layer": Layer,
    "Encoder": Encoder,
}
