"""Engine onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import fxprune
from benchmarks.engines.base import Case, Engine, Source, load_model, token_ids
from fxprune.evaluation.speed import timed_call


class OnnxEngine(Engine):
    """onnxruntime, with past keys and values as inputs, present ones as outputs, and logits of every position."""

    name: ClassVar[str] = "onnxruntime"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnxscript")
    writes: ClassVar[bool] = True
    last_only: ClassVar[bool] = False

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
        self.session = onnxruntime.InferenceSession(self.prepare(source), options, providers=[provider])
        self.shapes = {entry.name: entry.shape for entry in self.session.get_inputs()}
        self.vocabulary = int(self.session.get_outputs()[0].shape[-1])

    @classmethod
    def prepare(cls, source: Source) -> Path:
        """Export the program with a cache."""
        path = source.beside("decoder.onnx")
        if not path.exists():
            fxprune.export_model(load_model(source.folder), path, cache=True, verify=False)
        return path

    @classmethod
    def number_bytes(cls, device: str) -> tuple[float, float]:
        """Everything is float32."""
        return 4, 4

    def job(self, case: Case) -> Callable[[], float]:
        """Time one run of the session."""
        new = case.tokens if case.phase == "prefill" else 1
        feeds: dict[str, Any] = {"input_ids": token_ids(case.batch, new, self.vocabulary).numpy()}
        for name, shape in self.shapes.items():
            if name != "input_ids":
                past = (case.batch, shape[1], case.tokens if case.phase == "decode" else 0, shape[3])
                feeds[name] = np.zeros(past, dtype=np.float32)
        return timed_call(lambda: self.session.run(None, feeds))
