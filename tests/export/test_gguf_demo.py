"""The demo model with uneven widths, in the engine: perplexity, greedy tokens, and its tokenizer on many scripts."""

# ruff: noqa: RUF001 (words of other scripts are the point)

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fxprune
from benchmarks.common import load_demo_model
from benchmarks.engines.llama_cpp import LlamaServer
from fxprune.data.built_in import offline_text

SCRIPTS = (
    "Η ιστορία της πόλης αρχίζει με ένα μικρό χωριό",
    "История города начинается с деревни на берегу реки",
    "يبدأ تاريخ المدينة بقرية صغيرة على ضفاف النهر",
    "ההיסטוריה של העיר מתחילה בכפר קטן",
    "शहर का इतिहास नदी के किनारे एक गाँव से शुरू होता है",
    "这座 城市 的 历史 始于 河边 的 一个 小 村庄 ，",
    "この 町 の 歴史 は 川 の ほとり から 始まります 。 カタカナ",
    "도시의 역사는 강가의 작은 마을에서 시작된다",
    "ประวัติศาสตร์ ของ เมือง เริ่มต้น จาก หมู่บ้าน",
    "Größere Dörfer am Fluß, naïve cafés … “quoted” — 12345 ½ ² Ⅷ",
    "def f(x): return x**2 + 3_000 # it's 1,234.56 || !== <= {}[] we'll I've",
    "😀 👩‍👩‍👧 🇩🇪 <|im_start|> user \t tab",
)
TOKENS = 128


@pytest.fixture(scope="module")
def demo() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo model without the channels of least weight, from none to a fifth of them, in ten middle layers."""
    model, tokenizer = load_demo_model()
    for number, layer in enumerate(model.model.layers[14:24]):
        mlp = layer.mlp
        worth = mlp.down_proj.weight.norm(dim=0) * mlp.up_proj.weight.norm(dim=1) * mlp.gate_proj.weight.norm(dim=1)
        kept = worth.topk(1536 - 32 * number).indices.sort().values
        for part, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            part.weight = torch.nn.Parameter(part.weight.detach().index_select(dim, kept))
    return model, tokenizer


@pytest.mark.slow
def test_the_engine_gives_what_transformers_gives(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model, tokenizer = demo
    ids = tokenizer(offline_text()[2000:4000])["input_ids"][:TOKENS]
    prompt = tokenizer("The history of the city begins with")["input_ids"]
    stop = tokenizer.eos_token_id
    with torch.no_grad():
        logarithms = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        want = math.exp(-logarithms.gather(1, torch.tensor(ids[1:])[:, None]).mean())
    options = {"max_new_tokens": 32, "do_sample": False, "suppress_tokens": [stop]}
    following = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()

    path = fxprune.export_model(model, tmp_path / "slim.gguf", tokenizer=tokenizer)
    engine = LlamaServer(path, context=256, narrow=True)
    assert engine.perplexity(ids) == pytest.approx(want, rel=0.005)
    assert engine.greedy(prompt, 32, stop) == following
    differ = [line for line in lines() if engine.tokenize(line) != tokenizer(line)["input_ids"]]
    assert differ == []

    path = fxprune.export_model(model, tmp_path / "q8.gguf", tokenizer=tokenizer, quantization="q8_0")
    assert path.stat().st_size < 0.6 * (tmp_path / "slim.gguf").stat().st_size
    assert LlamaServer(path, context=256, narrow=True).perplexity(ids) == pytest.approx(want, rel=0.02)


def lines() -> list[str]:
    """A thousand lines, of words of one script each."""
    random.seed(0)
    scripts = itertools.cycle(script.split() for script in SCRIPTS)
    return [
        random.choice((" ", "", "  ")).join(random.choices(next(scripts), k=random.randint(1, 14))) for _ in range(1000)
    ]
