"""Engines in torch: transformers, transformers compiled, and the traced graph."""

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
from benchmarks.engines.base import Case, Engine, Source, load_model, token_ids
from fxprune.evaluation.speed import timed_call

_PROFILED_CALLS = 2

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
"""Ops of language models that torch's FLOP counter counts, by their names in the profiler."""


class TransformersEngine(Engine):
    """Transformers, called as by its `generate`: with a cache, and with logits of the last position only."""

    name: ClassVar[str] = "transformers"

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        if source.widths_of is None:
            model = load_model(source.folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="eager")
            cut_by_torch_pruning(model, load_model(source.widths_of))
            model.set_attn_implementation("sdpa")
        self.model = model.eval().to(device=device, dtype=torch.float32 if device == "cpu" else torch.float16)
        self.device = device
        self.call: Callable[..., Any] = self.model

    def job(self, case: Case) -> Callable[[], float]:
        """Time one call of the model."""
        return timed_call(torch.no_grad()(self._call_of(case)))

    def products(self, case: Case) -> float | None:
        """Measure the share by torch's profiler, which slows down everything else a little."""
        call = torch.no_grad()(self._call_of(case))
        call()
        on_gpu = self.device == "cuda"
        begin = time.perf_counter()
        with profile(use_device="cuda" if on_gpu else None, use_kineto=on_gpu) as profiled:
            for _ in range(_PROFILED_CALLS):
                call()
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
        found = [event for event in profiled.key_averages() if event.key.removeprefix("aten::") in _PRODUCTS]
        attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        return min(1.0, float(sum(getattr(event, attribute) for event in found)) / 1e6 / seconds)

    def _ids(self, case: Case) -> torch.Tensor:
        vocabulary = self.model.config.get_text_config().vocab_size
        return token_ids(case.batch, case.tokens, vocabulary).to(self.device)

    def _call_of(self, case: Case) -> Callable[[], None]:
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
    """The same calls, compiled; on a GPU as CUDA graphs.

    Blocks hold their index, so that each is compiled by itself.
    """

    name: ClassVar[str] = "torch.compile"
    by_name_only: ClassVar[bool] = True

    def products(self, case: Case) -> float | None:
        """Unknown: compiled code mixes products with the rest."""
        return None

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        super().__init__(source, device, largest)
        mode = "default" if device == "cpu" else "reduce-overhead"
        self.call = torch.compile(self.model, dynamic=False, mode=mode)


class GraphEngine(TransformersEngine):
    """The traced graph, which reads prompts without a cache and computes logits of every position."""

    name: ClassVar[str] = "graph"
    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    last_only: ClassVar[bool] = False

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        super().__init__(source, device, largest)
        self.graph_module = fxprune.trace(self.model).graph_module

    def _call_of(self, case: Case) -> Callable[[], None]:
        ids = self._ids(case)
        return lambda: self.graph_module(input_ids=ids)


def cut_by_torch_pruning(model: Any, like: nn.Module) -> None:
    """Cut a model in place with Torch-Pruning until its linear layers have the sizes of another model.

    Raises:
        ValueError: The two differ in more than widths between two layers.
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
            removed = list(range(wanted[name].out_features, layer.out_features))
            graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs=removed).prune()
    found = {name: (m.in_features, m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    differing = [name for name, m in wanted.items() if found[name] != (m.in_features, m.out_features)]
    if differing:
        raise ValueError(f"Torch-Pruning cannot make the sizes of {json.dumps(differing[:3])}")
