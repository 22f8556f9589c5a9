"""Layers that normalise what goes into attention and feed-forward, and not what comes out of them.

The sums between them are the hidden states, which one LayerNorm behind the last layer normalises.

Dimension key:  T packed tokens   N features
"""

from typing import Any, ClassVar

from torch import Tensor

from fastbert import encoder, touched
from fastbert.encoder import Run
from fastbert.families import _layers
from fastbert.families._family import Role, stock_of
from fastbert.families._layers import Fusions, Product, product
from fastbert.touched import Each, Parts, container


class ProjectAndSum(Role):
    """The end of both halves of a layer: SelfOutput, and Output."""

    parts: ClassVar[Parts] = {"dense": touched.linear, "dropout": touched.dropout}

    def forward(self, hidden_states: Tensor, input_tensor: Tensor, *, run: Run | None = None) -> Tensor:
        if run is None:
            return stock_of(self).forward(self, hidden_states, input_tensor)  # type: ignore[no-any-return]
        return encoder.project_and_sum(hidden_states, self.dense, getattr(self, "dropout", None), input_tensor)

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

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        run: Run | None = None,
        stream: int = 0,
        rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if run is None:
            return stock_of(self).forward(self, hidden_states, *args, **kwargs)
        normalised = encoder.normalise(hidden_states, getattr(self, self._norm), run)
        context = self.self(normalised, run=run, stream=stream)
        if rows is not None:
            context, hidden_states = context.index_select(0, rows), hidden_states.index_select(0, rows)
        return self.output(context, hidden_states, run=run)


class Intermediate(_layers.Intermediate):
    """With the LayerNorm in front of it."""

    parts: ClassVar[Parts] = {**_layers.Intermediate.parts, "LayerNorm": touched.norm}

    def forward(self, hidden_states: Tensor, *, run: Run | None = None) -> Tensor:
        if run is None:
            return stock_of(self).forward(self, hidden_states)  # type: ignore[no-any-return]
        normalised = encoder.normalise(hidden_states, self.LayerNorm, run)
        return encoder.linear_activation(normalised, self.dense, self.intermediate_act_fn, run.called)


class Layer(_layers.Layer):
    parts: ClassVar[Parts] = {
        "attention": container(Attention),
        "intermediate": container(_layers.Intermediate),
        "output": container(ProjectAndSum),
    }

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        run: Run | None = None,
        stream: int = 0,
        rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The packed hidden states, (T, N), after the layer; with rows, (M,), only of these tokens."""
        if run is None:
            return stock_of(self).forward(self, hidden_states, *args, **kwargs)
        attended = self.attention(hidden_states, run=run, stream=stream, rows=rows)
        return self.output(self.intermediate(self._before(attended, run), run=run), attended, run=run)

    def _before(self, attended_TN: Tensor, run: Run) -> Tensor:
        """What the feed-forward begins with."""
        return attended_TN

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
