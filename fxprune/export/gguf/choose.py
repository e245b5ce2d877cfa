"""The architecture and the layout that say a model, found by trying: what a file computes is compared with it."""

from __future__ import annotations

from fxprune.errors import ExportError
from fxprune.export.gguf.archs import Arch, candidates, joined, names_in_format, place_of
from fxprune.export.gguf.decoder import Decoder
from fxprune.export.gguf.layout import LAYOUTS, Contents, Layout, Unsaid, lay_out
from fxprune.export.gguf.reference import logits_of
from fxprune.masking.compare import compare

__all__ = ["contents_for"]


def contents_for(decoder: Decoder, tolerance: float) -> Contents:
    """Return what a file holds that computes what a model does.

    The architecture of the model's own type comes first; those whose blocks may differ are tried where it does not do.

    Args:
        decoder: the model.
        tolerance: largest accepted difference of logits, relative to the largest one.

    Raises:
        ExportError: none does; with the reason of each.
    """
    model_type = str(getattr(decoder.config, "model_type", ""))
    reasons = []
    for arch in candidates(model_type):
        found = _first_that_agrees(decoder, arch, tolerance)
        if isinstance(found, Contents):
            return found
        reasons.append(found)
    raise ExportError(
        f"the format cannot say this model: {'; '.join(dict.fromkeys(reasons))}",
        where=model_type,
        remedy="Prune to equal blocks with uniform=True, or export a .pt2 or .onnx file",
    )


def _first_that_agrees(decoder: Decoder, arch: Arch, tolerance: float) -> Contents | str:
    """Return the contents of a file of one architecture, or why there are none."""
    reason = ""
    for layout in _layouts(decoder, arch):
        try:
            contents = lay_out(decoder, arch, layout)
        except Unsaid as error:
            return reason or str(error)
        error_of_logits = compare([decoder.logits], [logits_of(contents, decoder.tokens)])
        if error_of_logits <= tolerance:
            return contents
        reason = reason or f"architecture {arch.name} computes something else, by {error_of_logits:.1e}"
    return reason


def _layouts(decoder: Decoder, arch: Arch) -> list[Layout]:
    """Return the layouts that may matter: a model without a fused tensor, or without rotation, has fewer."""
    whole = joined("attention")[0]
    fused = any(whole in names_in_format(place_of(name)[1], arch) for name in decoder.tensors)
    found = [layout for layout in LAYOUTS if fused or layout.fused == LAYOUTS[0].fused]
    return [layout for layout in found if decoder.rotary is not None or layout.rotary == LAYOUTS[0].rotary]
