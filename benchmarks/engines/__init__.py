"""Programs that run a model, each behind the same face: what is asked of them is timed by `benchmarks.latency`."""

from benchmarks.engines.base import Engine, Source
from benchmarks.engines.in_torch import CompiledEngine, GraphEngine, TransformersEngine
from benchmarks.engines.llama_cpp import LlamaCppEngine, LlamaCppQuantisedEngine
from benchmarks.engines.onnx import OnnxEngine
from benchmarks.engines.vllm import VllmEngine

__all__ = ["ENGINES", "Engine", "Source"]

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine
    for engine in (
        TransformersEngine,
        CompiledEngine,
        GraphEngine,
        OnnxEngine,
        LlamaCppEngine,
        LlamaCppQuantisedEngine,
        VllmEngine,
    )
}
"""By name, in the order in which they are measured."""
