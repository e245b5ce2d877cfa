"""Add a rule for your own op, so that groups extend across it."""

from __future__ import annotations

import torch
from torch import nn

import fxprune


@torch.library.custom_op("examples::gated", mutates_args=())
def gated(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return ``value`` where ``gate`` is positive, else 0; stands for a kernel of your own."""
    return value * (gate > 0)


@gated.register_fake
def _(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


class Network(nn.Module):
    """An MLP with the op in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(batch, 16)`` for ``(batch, 16)``."""
        hidden: torch.Tensor = gated(self.gate(x), self.up(x))
        out: torch.Tensor = self.down(hidden)
        return out


def main() -> None:
    """Find groups without and with the rule, and prune."""
    network, inputs = Network().eval(), {"x": torch.randn(3, 16)}
    groups = fxprune.find_groups(fxprune.dependency_graph(fxprune.trace(network, inputs)))
    print(f"without a rule: {len(groups)} groups, because the op is unknown")
    fxprune.rule(
        "examples::gated", notation="gate[*b, i], value[*b, i] -> out[*b, i]", values="product"
    )  # all three tensors have the same axes
    (group,) = fxprune.find_groups(fxprune.dependency_graph(fxprune.trace(network, inputs)))
    print(f"with a rule: {group.size} units of {', '.join(member.name for member in group.members)}")
    slim = fxprune.prune(network, recipe="llm-pruner", importance="l2", ratio=0.25, example_inputs=inputs)
    print(f"{slim.report.achieved:.1%} of the parameters removed: {slim.report.widths}")


if __name__ == "__main__":
    main()
