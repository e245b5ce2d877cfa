"""A model run by transformers as it is, by transformers compiled, and as the graph that was traced."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.profiler import profile
from transformers import AutoModelForCausalLM, DynamicCache

import fxprune
from benchmarks.engines.base import Engine, Source, load_model, token_ids
from benchmarks.latency.timing import timed
from benchmarks.latency.work import Case

__all__ = ["CompiledEngine", "GraphEngine", "TransformersEngine"]


_PROFILED = 2
"""Calls under the profiler."""

_PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}
"""What torch's counter of operations counts of a language model, by the names that its profiler uses."""


class TransformersEngine(Engine):
    """Transformers, as its `generate` calls a model: with a cache, and for the last position alone."""

    name: ClassVar[str] = "transformers"

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        model = _load(source).eval()
        self.model = model.to(device=device, dtype=torch.float32 if device == "cpu" else torch.float16)
        self.device = device
        self.call: Callable[..., Any] = self.model

    def job(self, case: Case) -> Callable[[], float]:
        """One call of the model."""
        return timed(torch.no_grad()(self._one(case)))

    def products(self, case: Case) -> float | None:
        """By torch's profiler, which slows down everything else a little."""
        call = torch.no_grad()(self._one(case))
        call()
        on_gpu = self.device == "cuda"
        begin = time.perf_counter()
        with profile(use_device="cuda" if on_gpu else None, use_kineto=on_gpu) as told:
            for _ in range(_PROFILED):
                call()
            if on_gpu:
                torch.cuda.synchronize()
            took = time.perf_counter() - begin
        found = [event for event in told.key_averages() if event.key.removeprefix("aten::") in _PRODUCTS]
        attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        return min(1.0, float(sum(getattr(event, attribute) for event in found)) / 1e6 / took)

    def _ids(self, case: Case) -> torch.Tensor:
        vocabulary = self.model.config.get_text_config().vocab_size
        return token_ids(case.batch, case.tokens, vocabulary).to(self.device)

    def _one(self, case: Case) -> Callable[[], None]:
        ids = self._ids(case)

        def prefill() -> None:
            self.call(input_ids=ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)

        if case.phase == "prefill":
            return prefill
        with torch.no_grad():
            cache: Any = self.model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values

        def decode() -> None:
            self.call(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-1)

        return decode


class CompiledEngine(TransformersEngine):
    """The same calls, compiled; on a GPU as CUDA graphs. Blocks know their number: none shares what is compiled."""

    name: ClassVar[str] = "torch.compile"
    by_name_only: ClassVar[bool] = True

    def products(self, case: Case) -> float | None:
        """Compiled code mixes products with the rest."""
        return None

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        super().__init__(source, device, largest)
        mode = "default" if device == "cpu" else "reduce-overhead"
        self.call = torch.compile(self.model, dynamic=False, mode=mode)


class GraphEngine(TransformersEngine):
    """The graph, which reads prompts without a cache and has an output for every position."""

    name: ClassVar[str] = "graph"
    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    last_only: ClassVar[bool] = False

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        super().__init__(source, device, largest)
        self.graph_module = fxprune.trace(self.model).graph_module

    def _one(self, case: Case) -> Callable[[], None]:
        ids = self._ids(case)
        return lambda: self.graph_module(input_ids=ids)


def _load(source: Source) -> Any:
    if source.widths_of is None:
        return load_model(source.folder)
    model = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="eager")
    cut_by_torch_pruning(model, load_model(source.widths_of))
    model.set_attn_implementation("sdpa")
    return model


def cut_by_torch_pruning(model: Any, like: nn.Module) -> None:
    """Let Torch-Pruning cut a model until its linear layers have the sizes of another's.

    Args:
        model: A model with all of its structures.
        like: The same model with less of them.

    Raises:
        ValueError: It cannot: the two differ in more than widths between two layers.
    """
    import torch_pruning as tp

    wanted = {name: layer for name, layer in like.named_modules() if isinstance(layer, nn.Linear)}
    inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(
            model, example_inputs=inputs, output_transform=lambda output: output.logits, verbose=False
        )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.out_features > wanted[name].out_features:
            gone = list(range(wanted[name].out_features, layer.out_features))
            graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs=gone).prune()
    found = {name: (m.in_features, m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    differing = [name for name, m in wanted.items() if found[name] != (m.in_features, m.out_features)]
    if differing:
        raise ValueError(f"Torch-Pruning cannot make the sizes of {json.dumps(differing[:3])}")
