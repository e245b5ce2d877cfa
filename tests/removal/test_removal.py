"""The removal decided for a graph, and the rescaling of its norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxprune.axes import Keep
from fxprune.errors import PlanError
from fxprune.removal.removal import (
    Removal,
    RescaledNumber,
    Scaling,
    kept_norm_modules,
    scaled_numbers,
    scaled_weights,
    unkept_norm_reasons,
)
from tests.oracle import Net, axes_of, discover, groups_of


def root_mean_square(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return w * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 1e-6, 0.1, 3.0]), st.sampled_from([0.0, 1.0]))
def test_the_norm_over_fewer_units_is_the_one_over_all_with_zeros(k: int, gone: int, eps: float, offset: float) -> None:
    """`w sqrt(n / k) x / sqrt(mean over k + e n / k)` is `w x / sqrt(mean over n + e)`, with `1 + w` as well."""
    n = k + gone
    x, w = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).unbind()
    x = x.where(torch.arange(n) < k, torch.zeros(1, dtype=torch.float64))
    masked = root_mean_square(x, w + offset, eps)[:k]
    slim = Scaling((n / k) ** 0.5, offset).of(w[:k]) + offset
    torch.testing.assert_close(root_mean_square(x[:k], slim, eps * n / k), masked)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_in_half_precision_the_weight_before_scaling_is_recovered(offset: float) -> None:
    w, scaling = torch.randn(50).to(torch.bfloat16), Scaling(1.25**0.5, offset)
    assert scaling.of(w).dtype == torch.bfloat16 and scaling.rounded(w).dtype == torch.float32
    again = (scaling.rounded(w) + offset) * scaling.factor - offset
    torch.testing.assert_close(again, scaling.of(w).float(), atol=1e-6, rtol=1e-6)
    assert float((scaling.rounded(w) - w.float()).abs().max()) < 0.02


def dense(norm: str) -> Any:
    """Two norms in a row, one of which has no weight."""

    def body(n: Any, x: torch.Tensor) -> Any:
        h = n.inner(x)
        return n.outer(root_mean_square(h, n.w, 0.5)), n.other(root_mean_square(n.more(x), 1.0, 0.5))  # type: ignore[arg-type]

    linears = {"inner": (6, 12), "more": (6, 8)}
    parts: dict[str, Any] = {name: nn.Linear(*sizes, bias=False) for name, sizes in linears.items()}
    parts |= {"outer": nn.Linear(12, 5), "other": nn.Linear(8, 5), "w": nn.Parameter(torch.rand(12))}
    return discover(Net(body, **parts), {"x": torch.randn(3, 6)}, norm=norm)


def test_numbers_and_weights_of_a_removal_and_the_reason_why_a_norm_is_not_rescaled() -> None:
    graph = dense("masked")
    axes, groups = axes_of(graph), {group.size: group for group in groups_of(graph)}
    for size in (12, 8):
        assert bool(groups[size].renormalised) is (size == 8)
    keep = Keep({groups[12].factor: np.arange(12) < 9, groups[8].factor: np.arange(8) < 4})  # type: ignore[dict-item]
    (change,) = scaled_numbers(axes, keep).values()
    assert change == RescaledNumber(0.5, 0.5 * 12 / 9)
    ((name, scaling),) = scaled_weights(axes, keep).items()
    assert name == "w" and scaling.offset == 0 and abs(scaling.factor - (12 / 9) ** 0.5) < 1e-12
    assert scaled_numbers(axes, Keep()) == scaled_weights(axes, Keep()) == {}
    assert len(kept_norm_modules(axes, keep)) == 1 and kept_norm_modules(axes, Keep()) == ()
    (line,) = unkept_norm_reasons(axes, groups[8].renormalised)
    assert "is taken over the kept units" in line and "before a weight has been multiplied" in line
    sliced = dense("sliced")
    assert unkept_norm_reasons(axes_of(sliced), [node for g in groups_of(sliced) for node in g.renormalised]) == ()


def test_kept_units_that_are_no_masks_are_refused() -> None:
    """A selection of the user's own ended in an AttributeError of numpy, or could leave no unit of a group."""
    graph = discover(
        Net(lambda n, x: n.b(n.a(x).relu()), a=nn.Linear(4, 12), b=nn.Linear(12, 5)), {"x": torch.ones(2, 4)}
    )
    axes, groups = axes_of(graph), groups_of(graph)
    (group,) = groups
    whole = np.ones(12, dtype=bool)
    for mask in (whole.tolist(), torch.ones(12).bool(), np.arange(6), whole.astype(int), whole[:-1], whole[None], None):
        with pytest.raises(PlanError, match=f"{group.name}: its kept units are .* an array of bools for each factor"):
            Removal(axes, groups, Keep({group.factor: mask}))  # type: ignore[dict-item]
    with pytest.raises(PlanError, match=f"{group.name}: 0 of 12 units stay. Keep at least 1"):
        Removal(axes, groups, Keep({group.factor: ~whole}))  # type: ignore[dict-item]
    with pytest.raises(PlanError, match=f"{group.name}: its kept units are"):
        Removal(axes, groups, Keep({group.name: whole}))  # type: ignore[dict-item]
    with pytest.raises(PlanError, match=r"removal: keep is \{\}"):
        Removal(axes, groups, {})  # type: ignore[arg-type]
