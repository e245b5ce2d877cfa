"""Rules of recurrent layers: hidden units go with their gates."""

from __future__ import annotations

from fxprune.axes import concat, new_factor, product
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes


@rule("lstm", "gru")
def recurrent(op: OpSite) -> None:
    """Weights ``(gates * hidden, in)`` and ``(gates * hidden, hidden)``, biases ``(gates * hidden,)``.

    The states ``(layers * directions, batch, hidden)`` of all layers and directions are stacked, so that a hidden unit
    goes from all of them. With weights of zero a unit that starts at zero stays there: it moves towards tanh(0).
    """
    x, weights = op.need("input"), op.list_of("params")
    alone = op.tensor("hx")
    states = op.list_of("hx") if alone is None else [alone]
    directions, layers = 1 + bool(op.arg("bidirectional")), op.arg("num_layers")
    each = 4 if op.arg("has_biases") else 2
    if op.has("batch_sizes") or len(weights) != each * layers * directions or x.rank != 3:
        op.freeze_all("packed sequences and projected states are not followed")
        return
    output, *last = op.outs
    batch = 0 if op.arg("batch_first") else 1
    first, hidden = states[0], states[0].axes[2]
    gates = new_factor(weights[0].sizes[0] // hidden.size)
    wide = concat(*[hidden] * directions) if directions > 1 else hidden
    op.freeze_expr(gates, "gates of a hidden unit")
    op.freeze(first, 0, "layers and directions are stacked")
    op.tie(first, 1, x, batch)
    op.tie(x, batch, output, batch)
    for tensor in (x, output):
        op.freeze(tensor, 1 - batch, "a state runs along this axis")
    for state in (*states[1:], *last):
        op.tie_all(first, state)
    for result in op.outs:
        op.keep_zeros(result, 2, *((state, 2) for state in states), *((weight, 0) for weight in weights))
    op.equate(output.axes[2], wide)
    for i in range(0, len(weights), each):
        to_gates, from_state, *biases = weights[i : i + each]
        for weight in (to_gates, from_state, *biases):
            op.equate(product(gates, hidden), weight.axes[0])
            op.link(weight, 0, output, 2)
        op.equate(from_state.axes[1], hidden)
        _read(op, to_gates, x if i < each * directions else output)
        _read(op, from_state, output)


def _read(op: OpSite, weight: TensorAxes, taken: TensorAxes) -> None:
    """State the product of a weight and the input of its layer: data, output of the layer before, or last state."""
    if weight.axes[1].size == taken.axes[2].size:
        op.equate(weight.axes[1], taken.axes[2])
    op.link(weight, 1, taken, 2)
    op.add_up((weight, 1), (taken, 2))
