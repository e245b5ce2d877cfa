"""Rules of recurrent layers: hidden units go with their gates."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.axes import Expr, concat, new_factor, product
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(op: OpSite) -> None:
    """Weights ``(gates * hidden, in)`` and ``(gates * hidden, hidden)``, biases ``(gates * hidden,)``.

    The states ``(layers * directions, batch, hidden)`` of all layers and directions are stacked, so that a hidden unit
    goes from all of them. With weights of zero a unit that starts at zero stays there: it moves towards tanh(0).
    """
    weights, states = op.list_of("params"), op.list_of("hx")
    directions, layers = 1 + bool(op.arg("bidirectional")), op.arg("num_layers")
    each = 4 if op.arg("has_biases") else 2
    x = op.tensor("input")
    if op.has("batch_sizes") or x is None or len(weights) != each * layers * directions or x.rank != 3:
        op.freeze_all("packed sequences and projected states are not followed")
        return
    output, *last = op.outs
    batch = 0 if op.arg("batch_first") else 1
    first, hidden = states[0], states[0].axes[2]
    wide = concat(*[hidden] * directions) if directions > 1 else hidden
    op.freeze(first, 0, "layers and directions are stacked")
    op.tie(first, 1, x, batch)
    op.tie(x, batch, output, batch)
    for tensor in (x, output):
        op.freeze(tensor, 1 - batch, "a state runs along this axis")
    for state in (*states[1:], *last):
        op.tie_all(first, state)
    op.equate(output.axes[2], wide)
    for i in range(0, len(weights), each):
        _step(op, hidden, weights[i : i + each], x if i < each * directions else output, output)
    for result in op.outs:
        op.keep_zeros(result, 2, *((state, 2) for state in states), *((weight, 0) for weight in weights))


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(op: OpSite) -> None:
    """One step of a :func:`recurrent` layer, from states ``(batch, hidden)`` to the next ones."""
    x, states = op.need("input"), op.list_of("hx")
    weights = [found for name in ("w_ih", "w_hh", "b_ih", "b_hh") if (found := op.tensor(name)) is not None]
    first = states[0]
    op.tie(first, 0, x, 0)
    for state in (*states[1:], *op.outs):
        op.tie_all(first, state)
    _step(op, first.axes[1], weights, x, first)
    for result in op.outs:
        op.keep_zeros(result, 1, *((state, 1) for state in states), *((weight, 0) for weight in weights))


def _step(op: OpSite, hidden: Expr, weights: Sequence[TensorAxes], x: TensorAxes, state: TensorAxes) -> None:
    """State the axes of the weights of a layer, in one direction, that read ``x`` and the last ``state``."""
    to_gates, from_state, *_ = weights
    gates = new_factor(to_gates.sizes[0] // hidden.size)
    op.freeze_expr(gates, "gates of a hidden unit")
    for weight in weights:
        op.equate(product(gates, hidden), weight.axes[0])
        op.link(weight, 0, op.outs[0], -1)
    op.equate(from_state.axes[1], hidden)
    for weight, taken in ((to_gates, x), (from_state, state)):
        if weight.axes[1].size == taken.axes[-1].size:
            op.equate(weight.axes[1], taken.axes[-1])
        op.link(weight, 1, taken, -1)
        op.add_up((weight, 1), (taken, -1))
