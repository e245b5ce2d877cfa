"""Models of torchvision and timm pruned out of the box, beside Torch-Pruning: `python -m benchmarks.vision`.

Weights are random, so that nothing is said of accuracy. *Ours* removes 30% of the parameters by the size of weights
(`importance="l2"`), with default kinds. *Theirs* is Torch-Pruning's `MetaPruner` by magnitude, which keeps the layers
that give the classes whole and removes 16% of the channels, which is near 30% of the parameters of most models. It
takes the extras `bench` and `vision`.
"""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer
from torch import nn

import fxprune
from benchmarks.common import RESULTS, write_results
from fxprune.masking.compare import TOLERANCE, compare
from fxprune.masking.masked_run import output_tensors

FILE = RESULTS / "vision.json"

_TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 "
    "resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn "
    "vit_b_32 wide_resnet50_2 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large fcn_resnet50 r3d_18 mc3_18"
)
_TIMM = (
    "coat_lite_tiny crossvit_tiny_240 cspresnet50 deit_tiny_patch16_224 dla34 dpn48b edgenext_xx_small "
    "efficientformer_l1 ese_vovnet19b_slim gernet_s ghostnet_100 gmixer_12_224 hardcorenas_a hrnet_w18_small lcnet_050 "
    "levit_128s mixer_s32_224 mobileone_s0 mobilevit_xxs nf_regnet_b0 pit_ti_224 poolformer_s12 pvt_v2_b0 repvgg_a0 "
    "res2net50_26w_4s resmlp_12_224 resnest14d resnetv2_50 rexnet_100 seresnet50 skresnet18 tinynet_e tf_mixnet_s "
    "twins_pcpvt_small visformer_tiny xcit_nano_12_p16_224"
)
NAMES = (*(f"torchvision/{name}" for name in _TORCHVISION.split()), *(f"timm/{name}" for name in _TIMM.split()))

_RATIO, _CHANNELS, _SECONDS = 0.3, 0.16, 45  # of parameters; of channels; of processor time for one prune
_FIXED = (
    "vit",
    "swin",
    "maxvit",
    "mixer",
    "mlp",
    "levit",
    "pit",
    "xcit",
    "twins",
    "deit",
    "coat",
    "former",
    "crossvit",
)
"""Parts of the names of models that take images of one size only."""


@dataclass(frozen=True)
class VisionRow:
    """A model pruned by one tool.

    Attributes:
        name: Of the model, behind its library.
        tool: `ours` or `theirs`.
        error: The error that ended it; empty if the slim model runs.
        exact: Whether it computes what the dense one computes with the same units zeroed.
        parameters: Fraction of the parameters that are left.
        seconds: Of processor time of the prune.
        forward: Time of a forward run, as a fraction of that of the dense model; the least of five of each.
    """

    name: str
    tool: str
    error: str = ""
    exact: bool = False
    parameters: float = 1.0
    seconds: float = 0.0
    forward: float = 1.0


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A random model in evaluation mode, and two random images, or clips, that it takes."""
    library, _, kind = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        model: Any = timm.create_model(kind, pretrained=False)
        side: int = model.default_cfg["input_size"][-1] if any(part in kind for part in _FIXED) else 64
    else:
        import torchvision

        aligned = {"weights_backbone": None} if "deeplab" in kind or "lraspp" in kind or "fcn" in kind else {}
        inits = {"init_weights": True} if kind in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(kind, weights=None, **aligned, **inits)
        side = 224 if any(part in kind for part in _FIXED) else 96 if kind == "inception_v3" else 64
    frames = (4,) if kind in ("r3d_18", "mc3_18") else ()
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model.eval(), torch.randn(2, 3, *frames, side, side)


def ours(name: str) -> VisionRow:
    """A prune by :func:`fxprune.prune`, which verifies it."""
    model, x = make(name)
    argument = "x" if name.startswith("timm/") else _first_argument(model)
    start = time.process_time()
    result = fxprune.prune(
        model, None, importance="l2", ratio=_RATIO, recipe="llm-pruner", protect=(), example_inputs={argument: x}
    )
    spent = time.process_time() - start
    error = result.report.verification_error
    before, after = result.report.parameters
    forward = _forward(lambda: result.graph_module(x)) / _forward(lambda: model(x))
    exact = error is not None and error <= TOLERANCE
    return VisionRow(name, "ours", "", exact, after / before, round(spent, 1), round(forward, 2))


def theirs(name: str) -> VisionRow:
    """A prune by Torch-Pruning, compared with the dense model whose removed channels are zeroed."""
    import torch_pruning as tp

    model, x = make(name)
    dense, zeroed = copy.deepcopy(model), copy.deepcopy(model)
    heads = [layer for layer in model.modules() if getattr(layer, "out_features", 0) == 1000]
    heads += [layer for layer in model.modules() if getattr(layer, "out_channels", 0) in (21, 1000)]
    twins = dict(zip(model.modules(), zeroed.modules(), strict=True))
    before = sum(parameter.numel() for parameter in model.parameters())
    start = time.process_time()
    importance = tp.importance.MagnitudeImportance(p=2)
    pruner = tp.pruner.MetaPruner(model, x, importance, pruning_ratio=_CHANNELS, ignored_layers=heads)
    left: dict[nn.Module, list[int]] = {}  # of each layer that is cut, several times where channels lie side by side
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            layer = dependency.target.module
            if layer in twins and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                own = left.setdefault(layer, list(range(pruner.DG.get_out_channels(layer))))
                _zero(twins[layer], [own[i] for i in indices])
                left[layer] = [unit for i, unit in enumerate(own) if i not in set(indices)]
        group.prune()
    spent = time.process_time() - start
    with torch.no_grad():
        error = compare(output_tensors(zeroed(x)), output_tensors(model(x)))
    after = sum(parameter.numel() for parameter in model.parameters())
    forward = _forward(lambda: model(x)) / _forward(lambda: dense(x))
    return VisionRow(name, "theirs", "", error <= TOLERANCE, after / before, round(spent, 1), round(forward, 2))


def _zero(layer: nn.Module, indices: list[int]) -> None:
    """Zero the weights and biases of channels that a layer gives."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    with torch.no_grad():
        for tensor, i in ((weight, axis), (bias, 0)):
            if isinstance(tensor, torch.Tensor):
                tensor.index_fill_(i, torch.tensor(indices), 0.0)


def _first_argument(model: nn.Module) -> str:
    return model.forward.__code__.co_varnames[1]


def _forward(run: Callable[[], Any]) -> float:
    """Processor time of a forward run: the least of five, after one that is not counted."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
    return min(times[1:])


def _work(name: str, tool: str) -> VisionRow:
    """One prune; errors become the row's."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return ours(name) if tool == "ours" else theirs(name)
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        return VisionRow(name, tool, f"{type(error).__name__}: {first}"[:200])


def _apart(name: str, tool: str) -> VisionRow:
    """One prune in a process of its own, which may crash or hang."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        sender.send(_work(name, tool))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        row: VisionRow = receiver.recv()
    except EOFError:
        row = VisionRow(name, tool, f"crashed, or not done after {_SECONDS} s of processor time")
    process.join()
    return row


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Models, as in timm/dla34; all of them by default.")] = None,
    json_: Annotated[bool, typer.Option("--json", help=f"Also write results/{FILE.name}.")] = False,
    rest: Annotated[bool, typer.Option("--rest", help="Leave models alone that the file has already.")] = False,
) -> None:
    """Prune models of torchvision and timm with both tools."""
    torch.set_num_threads(1)
    packages = {name: version(name) for name in ("torchvision", "timm", "torch-pruning")}
    rows = {(row["name"], row["tool"]): row for row in (json.loads(FILE.read_text())["rows"] if FILE.exists() else [])}
    for name, tool in itertools.product(names or NAMES, ("ours", "theirs")):
        if rest and (name, tool) in rows:
            continue
        rows[name, tool] = asdict(_apart(name, tool))
        typer.echo(json.dumps(rows[name, tool]))
        if json_:
            ordered = [rows[key] for key in itertools.product(NAMES, ("ours", "theirs")) if key in rows]
            write_results(FILE, {"rows": ordered}, packages)


if __name__ == "__main__":
    typer.run(main)
