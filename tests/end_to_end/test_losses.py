"""Models of many classes, trained briefly on made data: what data tell about them beats what weights do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import fx, nn

import fxprune
from fxprune.api import prune_traced
from fxprune.trace.inputs import shifted_right

Batch = dict[str, torch.Tensor]

SAMPLES = 96
_SEEN = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_READ = {**_SEEN, "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LOOKS = {**_SEEN, "image_size": 8, "patch_size": 4}


def bars(kinds: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """Noise with a bright row whose place is the kind of the picture: ``(samples, channels, height, width)``."""
    made = torch.randn(len(kinds), channels, height, width) * 1.5
    made[torch.arange(len(kinds)), :, kinds % height] += 2
    return made


def vit(kinds: torch.Tensor) -> tuple[nn.Module, Batch]:
    model = hf.ViTForImageClassification(hf.ViTConfig(**_LOOKS, num_labels=6))
    return model, {"pixel_values": bars(kinds, 3, 8, 8), "labels": kinds}


def whisper(kinds: torch.Tensor) -> tuple[nn.Module, Batch]:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _CODED.items()}
    ids = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.WhisperConfig(
        **sizes, **ids, d_model=24, vocab_size=20, num_mel_bins=8, max_source_positions=6, max_target_positions=8
    )
    words = torch.stack([kinds + 3, kinds + 9, 8 - kinds], dim=1)
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": bars(kinds, 1, 8, 12)[:, 0],
        "labels": words,
    }


_CODED = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}


def clip(kinds: torch.Tensor) -> tuple[nn.Module, Batch]:
    model = hf.CLIPModel(hf.CLIPConfig(text_config=_READ, vision_config=_LOOKS, projection_dim=16))
    ids = torch.cat([torch.randint(10, 20, (len(kinds), 3)), kinds[:, None] + 3, torch.full((len(kinds), 1), 2)], dim=1)
    return model, {"input_ids": ids, "pixel_values": bars(kinds, 3, 8, 8)}


def spans(kinds: torch.Tensor) -> tuple[nn.Module, Batch]:
    ids = torch.randint(5, 20, (len(kinds), 10))
    ends = kinds + torch.randint(1, 4, kinds.shape)
    rows = torch.arange(len(kinds))
    ids[rows, kinds], ids[rows, ends] = 3, 4
    ids = torch.where(torch.rand(ids.shape) < 0.2, torch.randint(5, 20, ids.shape), ids)
    model = hf.BertForQuestionAnswering(hf.BertConfig(**_READ))
    return model, {"input_ids": ids, "start_positions": kinds, "end_positions": ends}


TABLE = torch.randint(3, 14, (6, 6, 3), generator=torch.Generator().manual_seed(0))
"""The words that two kinds together stand for; neither tells them alone."""


def phrases(kinds: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The words for pairs of kinds, one in five of them another, so that no model is ever sure: ``(samples, 3)``."""
    words = TABLE[kinds, others]
    return torch.where(torch.rand(words.shape) < 0.2, torch.randint(3, 14, words.shape), words)


def t5(kinds: torch.Tensor) -> tuple[nn.Module, Batch]:
    others = torch.randint(6, kinds.shape)
    ids = torch.stack([kinds + 3, others + 9, torch.full_like(kinds, 2)], dim=1)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 96, "num_heads": 4, "num_layers": 2}
    config = hf.T5Config(**sizes, vocab_size=20, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": phrases(kinds, others)}


def llava(kinds: torch.Tensor) -> tuple[nn.Module, Batch]:
    others, image = torch.randint(6, kinds.shape), torch.full((len(kinds), 4), 23)  # a token for each patch
    ids = torch.cat([image, others[:, None] + 14, phrases(kinds, others)], dim=1)
    made = {"input_ids": ids, "pixel_values": bars(kinds, 3, 8, 8), "labels": ids.masked_fill(ids > 13, -100)}
    text, tower = hf.LlamaConfig(**{**_READ, "vocab_size": 24}), hf.CLIPVisionConfig(**_LOOKS)
    config = hf.LlavaConfig(text_config=text, vision_config=tower, image_token_index=23)
    return hf.LlavaForConditionalGeneration(config), made


@dataclass(frozen=True)
class Case:
    """A model and made data for a number of kinds.

    Args:
        labelled: whether the samples that it is pruned on have labels.
        training: further arguments of its forward for a loss.
        batch: samples of a step; as many as there are kinds if those of a kind are told apart.
        steps: of its training.
        learnt: samples that it is trained on; so many that it does not learn them by heart.
        at_once: samples that its graph takes; one where its code goes over them.
        kinds: kinds of units that go.
    """

    make: Callable[[torch.Tensor], tuple[nn.Module, Batch]]
    labelled: bool = True
    training: tuple[str, ...] = ()
    batch: int = 24
    steps: int = 200
    learnt: int = SAMPLES
    at_once: int = SAMPLES
    kinds: tuple[str, ...] = ("mlp",)


CASES: dict[str, Case] = {
    "vit-labels": Case(vit),
    "vit": Case(vit, labelled=False),
    "whisper": Case(whisper, steps=300, learnt=480, kinds=("mlp", "head")),
    "clip": Case(clip, training=("return_loss",), batch=6),
    "bert-spans": Case(spans),
    "t5": Case(t5, steps=300, learnt=480, kinds=("mlp", "head")),
    "llava": Case(llava, steps=300, learnt=2400, at_once=1),
}
_LABELS = ("labels", "start_positions", "end_positions")

SHARED: dict[str, Any] = {"ratio": 0.25, "protect": (), "ranking": "local"}
WAYS: dict[str, Mapping[str, Any]] = {
    "taylor": {"recipe": "llm-pruner", "importance": "taylor{order=second}"},
    "wanda": {"recipe": "llm-pruner", "importance": "wanda{readers_only}"},
    "least squares": {"recipe": "fast"},
    "tuning": {"recipe": "llm-pruner", "importance": "l2", "tune": "tune{epochs=3}"},
}


def trained(case: Case) -> tuple[nn.Module, Batch, Batch]:
    """A model after some steps on its own loss, samples to prune it on, and inputs to compare on."""
    torch.manual_seed(0)
    kinds = torch.arange(case.learnt + SAMPLES) % 6
    model, data = case.make(kinds)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for step in range(case.steps):
        rows = (torch.arange(case.batch) + case.batch * step) % case.learnt
        optimizer.zero_grad()
        found: Any = model(**{name: value[rows] for name, value in data.items()}, **dict.fromkeys(case.training, True))
        found.loss.backward()
        optimizer.step()
    given = {name: value[:SAMPLES] for name, value in data.items() if case.labelled or name not in _LABELS}
    inputs = {name: value[case.learnt :] for name, value in data.items() if name not in _LABELS}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = shifted_right(model, data["labels"][case.learnt :])
    return model.eval(), given, inputs


def divergence(dense: fx.GraphModule, slim: fx.GraphModule, inputs: Batch, at_once: int) -> float:
    """Mean divergence, in nats, of the distributions along the last axis of all outputs that are called logits."""
    every = [inputs[str(node.target)].split(at_once) for node in dense.graph.nodes if node.op == "placeholder"]
    found = []
    for values in zip(*every, strict=True):
        with torch.no_grad():
            want, got = dense(*values), slim(*values)
        for name in (name for name in want if "logits" in name):
            p, q = want[name].log_softmax(-1), got[name].log_softmax(-1)
            found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return sum(found) / len(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_scores_fits_and_tuning_on_data_do_less_harm_than_weights_alone(name: str) -> None:
    case = CASES[name]
    model, samples, inputs = trained(case)
    dense = fxprune.trace(model, {key: value[: min(2, case.at_once)] for key, value in inputs.items()}).graph_module
    found = {}
    for way, options in {"l2": {"recipe": "llm-pruner", "importance": "l2"}, **WAYS}.items():
        chosen: Any = {**SHARED, "kinds": case.kinds, **options}
        result = prune_traced(dense, model, None if way == "l2" else samples, chosen)
        assert not any("labels do not count" in note for note in result.report.notes)
        assert result.report.achieved == pytest.approx(SHARED["ratio"], abs=0.03)
        found[way] = divergence(dense, result.graph_module, inputs, case.at_once)
    assert all(found[way] < found["l2"] for way in WAYS), found
