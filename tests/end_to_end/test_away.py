"""Pruned with weights carried to another device: a second one is made up, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_SCRIPT = """
import sys, torch, fxprune
from fxprune.recipes import read_recipe
from tests import away
from tests.models import tiny, token_ids

torch.set_num_threads(1)
device = away.register()
with_both = torch.ones(2, device=device)
try:
    with_both + torch.ones(2)
except RuntimeError:
    pass
else:
    raise SystemExit("the device takes what is on the CPU")

def require_same(one, other):
    assert one.plan == other.plan
    assert other.report.verification_error is not None
    for name, value in one.model.state_dict().items():
        found = other.model.state_dict()[name]
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
"""

_TAYLOR = """
model, ids = tiny("llama", num_hidden_layers=3), token_ids(6)
for order, memory in (("mix", "low"), ("first", "fast"), ("second", "auto")):
    options = dict(recipe="llm-pruner", importance=f"taylor{{order={order}}}", memory=memory, ratio=0.25)
    options["compensate"] = "least-squares{reach=all}"
    require_same(fxprune.prune(model, ids, **options), fxprune.prune(model, ids, device=device, **options))
"""

_OTHERS = """
ids = token_ids(6)
experts = tiny("qwen2_moe")
for options in (
    dict(importance="reap", kinds="expert", compensate="rotation"),
    dict(importance="taylor", memory="low", compensate="least-squares", kinds=("mlp", "head")),
    dict(importance="flap", compensate="least-squares", kinds=("mlp", "head")),
):
    options |= dict(recipe="llm-pruner", ratio=0.2)
    require_same(fxprune.prune(experts, ids, **options), fxprune.prune(experts, ids, device=device, **options))
dense, default = tiny("llama"), str(read_recipe("balanced")).replace("weights=auto, ", "")  # which rounding moves more
for name in ("record-teacher", "tune"):  # some CPUs have bfloat16, and this device has not
    default = default.replace(name + "{", name + "{precision=float32, ")
default = default.replace("written=384, added=200", "written=24, added=12")
ids, options = token_ids(12), dict(recipe=default)
require_same(fxprune.prune(dense, ids, **options), fxprune.prune(dense, ids, device=device, **options))
"""

_FOLDER = """
tiny("llama", num_hidden_layers=3).save_pretrained(f"{sys.argv[1]}/dense", max_shard_size="200KB")
options = dict(recipe="llm-pruner", ratio=0.2, compensate="least-squares")
found = [
    fxprune.prune_checkpoint(f"{sys.argv[1]}/dense", f"{sys.argv[1]}/{name}", token_ids(6), device=name, **options)
    for name in ("cpu", "away")
]
require_same(*found)
plan = found[0].plan
options = dict(compensate="least-squares")
model = tiny("llama", num_hidden_layers=3)
require_same(*(fxprune.apply(model, plan, token_ids(6), device=name, **options) for name in (None, "away")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("work", [_TAYLOR, _OTHERS, _FOLDER], ids=["taylor", "others", "folder"])
def test_a_prune_there_is_the_same(work: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT + work)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
