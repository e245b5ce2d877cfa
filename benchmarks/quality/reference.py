"""The dense model as a reference whose predictions are computed once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fxprune.evaluation import logits_of
from fxprune.offload.atomic import atomic_path


def weights_digest(model: Any) -> str:
    """Digest of the names, the values and the dtype of a model's weights, 16 hexadecimal digits."""
    digest = hashlib.sha256(str(model.dtype).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class KeptReference:
    """A model that keeps what its output embedding reads in files, and runs only the embedding when asked again.

    The logits are the same to the last bit, and what is kept is as much smaller as the stream is narrower than the
    vocabulary is large. A model whose logits are more than this product runs anew each time.

    Args:
        model: A Hugging Face model in evaluation mode; it is not changed.
        folder: Folder for the files; a subfolder of it is named after the weights.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder / weights_digest(model)

    def __call__(self, *, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of windows: `(windows, tokens, vocabulary)`."""
        digest = hashlib.sha256(str(tuple(input_ids.shape)).encode() + input_ids.numpy().tobytes())
        file = self.folder / f"{digest.hexdigest()[:32]}.safetensors"
        if file.exists():
            return logits_of(self.model.get_output_embeddings()(load_file(file)["read"]))
        logits, read = self._run(input_ids)
        if len(read) == 1 and torch.equal(self.model.get_output_embeddings()(read[0]), logits):
            with atomic_path(file, parents=True) as new:
                save_file({"read": read[0].contiguous()}, new)
        return logits

    def _run(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits, and the inputs of the output embedding by call."""
        read: list[torch.Tensor] = []
        embedding = self.model.get_output_embeddings()
        if embedding is None:
            return logits_of(self.model(input_ids=input_ids, use_cache=False)), read
        hook = embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
        try:
            return logits_of(self.model(input_ids=input_ids, use_cache=False)), read
        finally:
            hook.remove()
