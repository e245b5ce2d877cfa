"""Damaged files as sources: an error that says which file, or exactly the numbers of the undamaged one."""

import json
import random
import resource
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import datasets
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_structure

import fxprune
from fxprune.checkpoint.low_memory import load_mapped
from fxprune.checkpoint.read import check_gguf, load_config_only, load_model, load_tokenizer, read_header
from fxprune.cli.config import read_config
from fxprune.cli.models import check_model
from fxprune.cli.plan import read_plan
from fxprune.data.text import calibration_text, read_text
from fxprune.discovery.dependency import Dependencies
from fxprune.errors import FxpruneError
from fxprune.graph.compat import tree_leaves
from fxprune.graph.facts import facts_of
from fxprune.recovery.run import claim_folder, last_checkpoint
from fxprune.removal.budget import read_timing
from fxprune.removal.plan import keep_of, plan_of
from fxprune.removal.removal import Scores
from tests.bad_input.refusals import LONGEST
from tests.checkpoint.small import sealed
from tests.cli.running import COMMAND
from tests.export.small import tokenizer, uneven
from tests.models import tiny, token_ids
from tests.remembered import grouped, model_of
from tests.tiers import tiers

Damage = Callable[[Path], None]
SMALL = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 32}
SECONDS = 30
MEMORY = 1 << 31
"""Bytes that reading a small damaged file may ask for beyond what the process has."""

WEIGHTS, CONFIG, INDEX, MANIFEST = "model.safetensors", "config.json", "model.safetensors.index.json", "fxprune.json"


# What can be wrong with bytes, with JSON, and with the header of a file of tensors


def edited(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Another content of a file, made of the one it has."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def cut(name: str, at: float | int) -> Damage:
    """A file that ends early: after so many bytes, or at a fraction of it."""
    return edited(name, lambda data: data[: at if isinstance(at, int) else int(len(data) * at)])


def content(name: str, value: bytes | str) -> Damage:
    return edited(name, lambda _: value if isinstance(value, bytes) else value.encode())


def flipped(name: str, seed: int, front: int | None = None, bits: int = 1) -> Damage:
    """Some bits that are others, among the first ``front`` bytes or anywhere."""

    def flip(data: bytes) -> bytes:
        changed, draw = bytearray(data), random.Random(seed)
        for _ in range(bits):
            changed[draw.randrange(min(front or len(data), len(data)))] ^= 1 << draw.randrange(8)
        return bytes(changed)

    return edited(name, flip)


def inserted(name: str, seed: int) -> Damage:
    def insert(data: bytes) -> bytes:
        draw = random.Random(seed)
        at = draw.randrange(len(data))
        return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:]

    return edited(name, insert)


def recoded(name: str, encoding: str) -> Damage:
    return edited(name, lambda data: data.decode().encode(encoding, "replace"))


def replaced(name: str, make: Callable[[Path], object] = lambda _: None) -> Damage:
    """Something else in the place of a file, or nothing."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def field(name: str, *path: Any, value: Any = ..., seal: bool = False) -> Damage:
    """Another value in a JSON document; ``...`` takes it away; a function changes it.

    Args:
        seal: write the digest of the document anew, as one who changes a manifest on purpose would.
    """

    def change(text: bytes) -> bytes:
        data = json.loads(text)
        held = data
        for key in path[:-1]:
            held = held[key if key != FIRST_ENTRY else next(iter(held))]
        if value is ...:
            del held[path[-1]]
        else:
            held[path[-1]] = value(held.get(path[-1])) if callable(value) else value
        return json.dumps(sealed(data) if seal else data).encode()

    return edited(name, change)


FIRST_ENTRY = object()
"""In the path of a field: the first key that there is."""


def twice(name: str, key: str, value: str) -> Damage:
    """A key that is there twice."""
    return edited(name, lambda text: text.rstrip()[:-1].rstrip() + f', "{key}": {value}}}'.encode())


def header(change: Callable[[dict[str, Any]], Any], pad: int = 0) -> Damage:
    """Another header of a file of tensors, as JSON or as bytes."""

    def replace(raw: bytes) -> bytes:
        size = struct.unpack("<Q", raw[:8])[0]
        data = json.loads(raw[8 : 8 + size])
        changed = change(data)
        text = changed if isinstance(changed, bytes) else json.dumps(data if changed is None else changed).encode()
        return struct.pack("<Q", len(text) + pad) + text + raw[8 + size :]

    return edited(WEIGHTS, replace)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Other tensors in a well-formed file."""

    def damage(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, {"format": "pt"})

    return damage


def swap(held: dict[str, Any], a: str, b: str) -> None:
    held[a], held[b] = held[b], held[a]


Q, K, UP, DOWN = (
    f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
)


def of_bytes(name: str) -> dict[str, Damage]:
    """What can happen to any file."""
    found: dict[str, Damage] = {f"{name} cut at {at}": cut(name, at) for at in (1, 7, 8, 9, 40, 0.3, 0.5, 0.9, -1)}
    found |= {f"{name} with bit {seed} flipped": flipped(name, seed) for seed in range(6)}
    found |= {f"{name} with bits {seed} flipped": flipped(name, seed, 400, 5) for seed in range(6)}
    found |= {f"{name} with bytes {seed} more": inserted(name, seed) for seed in range(4)}
    found |= {f"{name} empty": content(name, ""), f"{name} random": content(name, random.Random(0).randbytes(3000))}
    found |= {f"{name} gone": replaced(name), f"{name} a folder": replaced(name, Path.mkdir)}
    found[f"{name} a loop"] = replaced(name, lambda file: file.symlink_to(file.name))
    found[f"{name} a link to nothing"] = replaced(name, lambda file: file.symlink_to("nothing"))
    return found


def of_text(name: str) -> dict[str, Damage]:
    found = {f"{name} in {code}": recoded(name, code) for code in ("utf-16", "utf-32", "utf-8-sig", "cp500")}
    values = ("null", "[]", "3", '"x"', "{}", "[{}]", "NaN", "{}{}", "{'a': 1}")
    long = ("[" * 100_000, '{"a":' * 100_000, "\0" * 100)
    return found | {f"{name} is {value[:6]!r}": content(name, value) for value in (*values, *long)}


ODD = (None, "x", -1, 0, 10**6, 1.5, 1e400, float("nan"), True, [], {}, 2**40, 2**70, "12", [1, 2], {"a": 1})


def of_config() -> dict[str, Damage]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "vocab_size", "head_dim", "rms_norm_eps", "hidden_act", "architectures", "model_type", "rope_parameters",
            "max_position_embeddings", "tie_word_embeddings", "dtype")  # fmt: skip
    found = {
        f"{key} is {str(value)[:12]!r} {type(value).__name__}": field(CONFIG, key, value=value)
        for key in keys for value in ODD
    }  # fmt: skip
    found |= {f"no {key}": field(CONFIG, key) for key in ("hidden_size", "model_type", "architectures", "vocab_size")}
    near = {"num_hidden_layers": (1, 3), "num_attention_heads": (1, 3, 4)}
    near |= {"intermediate_size": (15, 17), "hidden_size": (11, 13, 24)}
    found |= {f"{key} is {value}": field(CONFIG, key, value=value) for key, values in near.items() for value in values}
    found |= {
        f"hidden_act is {value}": field(CONFIG, "hidden_act", value=value)
        for value in ("nope", "", "ReLU6", "__class__")
    }
    found |= {f"{key} twice": twice(CONFIG, key, "7") for key in ("hidden_size", "num_hidden_layers")}
    found["auto_map"] = field(CONFIG, "auto_map", value={"AutoModelForCausalLM": "evil.Model"})
    found["quantised"] = field(CONFIG, "quantization_config", value={"quant_method": "nope"})
    found["quantised, odd"] = field(CONFIG, "quantization_config", value=3)
    found["architecture of another"] = field(CONFIG, "architectures", value=["GPT2LMHeadModel"])
    found["type of another"] = field(CONFIG, "model_type", value="gpt2")
    return found


def of_tensors() -> dict[str, Damage]:
    huge = 2**62
    return {
        "two names swapped": header(lambda d: swap(d, Q, DOWN)),
        "two alike swapped": header(lambda d: swap(d, UP, "model.layers.0.mlp.gate_proj.weight")),
        "no tensor": header(lambda d: d.pop(Q)),
        "no tensors": header(lambda d: {}),
        "another name": header(lambda d: d.update({"nope": d.pop(Q)})),
        "one more": header(lambda d: d.update(nope=d[Q])),
        "wrong type": header(lambda d: d[Q].update(dtype="F16")),
        "type of the same size": header(lambda d: d[Q].update(dtype="I32")),
        "unknown type": header(lambda d: d[Q].update(dtype="F31")),
        "type as number": header(lambda d: d[Q].update(dtype=3)),
        "no type": header(lambda d: d[Q].pop("dtype")),
        "no shape": header(lambda d: d[Q].pop("shape")),
        "no place": header(lambda d: d[Q].pop("data_offsets")),
        "shape turned": header(lambda d: d[DOWN].update(shape=d[DOWN]["shape"][::-1])),
        "shape flat": header(lambda d: d[Q].update(shape=[144])),
        "shape of one more": header(lambda d: d[Q].update(shape=[13, 12])),
        "shape of one less": header(lambda d: d[Q].update(shape=[11, 12])),
        "shape negative": header(lambda d: d[Q].update(shape=[-12, -12])),
        "shape huge": header(lambda d: d[Q].update(shape=[2**40, 2**40])),
        "shape that overflows": header(lambda d: d[Q].update(shape=[2**63, 2])),
        "shape of nothing": header(lambda d: d[Q].update(shape=[0, huge])),
        "shape of fractions": header(lambda d: d[Q].update(shape=[12.5, 12])),
        "shape of words": header(lambda d: d[Q].update(shape=["12", "12"])),
        "places overlap": header(lambda d: d[Q].update(data_offsets=d[K]["data_offsets"])),
        "places back": header(lambda d: d[Q].update(data_offsets=d[Q]["data_offsets"][::-1])),
        "places off by one": header(lambda d: d[Q].update(data_offsets=[x + 1 for x in d[Q]["data_offsets"]])),
        "places behind the end": header(lambda d: d[Q].update(data_offsets=[x + 10**9 for x in d[Q]["data_offsets"]])),
        "places negative": header(lambda d: d[Q].update(data_offsets=[-576, 0])),
        "places huge": header(lambda d: d[Q].update(data_offsets=[0, huge])),
        "header longer than said": header(lambda d: None, -9),
        "header shorter than said": header(lambda d: None, 9),
        "header huge": header(lambda d: None, huge),
        "header of 200 MB": header(lambda d: None, 200 << 20),
        "header a list": header(lambda d: [d]),
        "header deep": header(lambda d: b"[" * 50_000),
        "header not JSON": header(lambda d: b"{'a': 1}"),
        "header not UTF-8": header(lambda d: b'{"\xff": 1}'),
        "metadata odd": header(lambda d: d.update(__metadata__=3)),
        "metadata of numbers": header(lambda d: d.update(__metadata__={"format": 3})),
        "metadata of another": header(lambda d: d.update(__metadata__={"format": "tf"})),
        "metadata gone": header(lambda d: d.pop("__metadata__")),
        "names doubled": header(lambda d: f'{json.dumps(d)[:-1]}, "{Q}": {json.dumps(d[Q])}}}'.encode()),
        "in float16": tensors(lambda d: d.update({k: v.half() for k, v in d.items()})),
        "one in float16": tensors(lambda d: d.update({Q: d[Q].half()})),
        "one in integers": tensors(lambda d: d.update({Q: (d[Q] * 99).int()})),
        "one complex": tensors(lambda d: d.update({Q: d[Q].to(torch.complex64)})),
        "one of booleans": tensors(lambda d: d.update({Q: d[Q] > 0})),
        "one of float8": tensors(lambda d: d.update({Q: d[Q].to(torch.float8_e4m3fn)})),
        "one empty": tensors(lambda d: d.update({Q: d[Q][:0]})),
        "one a number": tensors(lambda d: d.update({Q: d[Q].sum()})),
        "one longer": tensors(lambda d: d.update({Q: torch.cat((d[Q], d[Q][:1]))})),
        "one shorter": tensors(lambda d: d.update({Q: d[Q][:-1].clone()})),
        "one of another rank": tensors(lambda d: d.update({Q: d[Q][None].clone()})),
        "not a number": tensors(lambda d: d[Q].view(-1)[3].fill_(float("nan"))),
        "infinite": tensors(lambda d: d[UP].fill_(float("inf"))),
        "all zero": tensors(lambda d: d[UP].zero_()),
        "a layer gone": tensors(lambda d: [d.pop(k) for k in list(d) if ".layers.1." in k]),
        "a layer more": tensors(lambda d: d.update({k.replace(".1.", ".2."): d[k].clone() for k in d})),
        "no head": tensors(lambda d: d.pop("lm_head.weight")),
        "a prefix": tensors(lambda d: [d.update({f"x.{k}": d.pop(k)}) for k in list(d)]),
    }  # fmt: skip


def of_index() -> dict[str, Damage]:
    def at(*path: Any, value: Any = ...) -> Damage:
        return field(INDEX, *path, value=value)

    maps: tuple[Any, ...] = (None, 3, [], {}, "x", {"a": "b"})
    odd = (None, 3, "nope.safetensors", "../dense/model.safetensors", "/etc/passwd", "", [], CONFIG)
    return {
        **{f"index: a tensor in {str(value)!r}": at("weight_map", Q, value=value) for value in odd},
        **{f"index: weight_map is {str(value)!r}": at("weight_map", value=value) for value in maps},
        "index: no weight_map": at("weight_map"),
        "index: no tensor": at("weight_map", Q),
        "index: one more": at("weight_map", "nope", value=lambda _: "model-00001-of-00002.safetensors"),
        "index: metadata is 3": at("metadata", value=3),
        "index: no metadata": at("metadata"),
        "index: size": at("metadata", "total_size", value=-1),
        "index: a shard gone": lambda folder: sorted(folder.glob("model-*"))[0].unlink(),
        "index: shards swapped": lambda folder: _swap_files(*sorted(folder.glob("model-*"))[:2]),
        "index: a shard cut": lambda folder: cut(sorted(folder.glob("model-*"))[0].name, 0.5)(folder),
        "index: all in one, too": lambda folder: None,
    }  # fmt: skip


def of_manifest() -> dict[str, Damage]:
    """Another manifest that is sealed anew: its digest tells nothing."""
    one = ("weights", FIRST_ENTRY)
    odd: dict[tuple[Any, ...], tuple[Any, ...]] = {
        ("format",): (99, "2", None, ..., 2.5, [], True),
        ("weights",): ({}, [], None, ..., 3, {"a": 3}, {"a": {}}, {"../x": {}}),
        ("files",): ([], None, 3, {"nope": "x"}, {CONFIG: 3}, {CONFIG: "x"}, {"../x": "y"}),
        ("plan",): ([], 3, {}, "x", {"version": 1}, {"kept": {}}),
        **{(name,): (3,) for name in ("source", "stock", "versions", "report", "nonsense")},
        (*one, "size"): (0, -1, "x", None, 1e400, 2**70),
        (*one, "tensors"): ({}, [], None, {"a": [1]}, {"a": "x"}, {"a": None}),
        **{(*one, name): (3,) for name in ("sha256", "more")},
    }
    return {
        f"manifest: {path[-1]} is {value!r}": field(MANIFEST, *path, value=value, seal=True)
        for path, values in odd.items()
        for value in values
    }


GGUF = "model.gguf"


def in_gguf(value: int, place: Callable[[Any], Any]) -> Damage:
    """Another number at a place in the header of a GGUF file."""

    def damage(folder: Path) -> None:
        reader = gguf.GGUFReader(folder / GGUF, "r+")
        held = place(reader)
        held[0] = np.array(value, dtype=np.uint64).astype(held.dtype)
        reader.data.flush()

    return damage


def of_gguf() -> dict[str, Damage]:
    def count(place: int, value: int, size: str = "<Q") -> Damage:
        end = place + struct.calcsize(size)
        return edited(GGUF, lambda data: data[:place] + struct.pack(size, value) + data[end:])

    def key(name: str, value: int, part: int = -1) -> Damage:
        return in_gguf(value, lambda reader: reader.fields[name].parts[part])

    def info(part: int, value: int) -> Damage:
        return in_gguf(value, lambda reader: reader.tensors[3].field.parts[part])

    numbers = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
               "attention.head_count_kv", "context_length", "rope.dimension_count")  # fmt: skip
    large = (0, 1, 3, 7, 10**6, 2**31, 2**32 - 1)
    many = (0, 1, 20, 22, 2**31, 2**40, 2**62, 2**64 - 1)
    found = {f"gguf: version {n}": count(4, n, "<I") for n in (0, 1, 2, 4, 3 << 24)}
    found |= {f"gguf: {n} tensors": count(8, n) for n in many} | {f"gguf: {n} keys": count(16, n) for n in many}
    found |= {f"gguf: {name} is {n}": key(f"llama.{name}", n) for name in numbers for n in large}
    found |= {f"gguf: name of {n} bytes": key("llama.block_count", n, 0) for n in many}
    found |= {f"gguf: value of type {n}": key("llama.block_count", n, 2) for n in (0, 6, 8, 9, 12, 13, 2**31)}
    found |= {f"gguf: {n} words": key("tokenizer.ggml.tokens", n, 4) for n in many}
    found |= {f"gguf: words of type {n}": key("tokenizer.ggml.tokens", n, 3) for n in (0, 4, 9, 12, 13)}
    found |= {f"gguf: architecture of {n} bytes": key("general.architecture", n, 3) for n in many}
    found |= {f"gguf: tensor name of {n} bytes": info(0, n) for n in many}
    found |= {f"gguf: tensor of {n} axes": info(2, n) for n in (0, 1, 3, 9, 2**31)}
    found |= {f"gguf: axis of {n}": info(3, n) for n in (0, 1, 11, 13, 2**31, 2**62, 2**64 - 1)}
    found |= {f"gguf: tensor of type {n}": info(4, n) for n in (1, 2, 8, 26, 31, 99, 2**31)}
    return found | {f"gguf: tensor at {n}": info(5, n) for n in (0, 1, 32, 10**6, 2**62, 2**64 - 1)}


def _swap_files(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def alike(a: Any, b: Any) -> bool:
    """Whether two results are the same, bit for bit."""
    pairs = list(zip(*(tree_leaves(x) for x in (a, b)), strict=False))
    return tree_structure(a) == tree_structure(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, torch.Tensor) else np.array_equal(x, y)
        for x, y in pairs
    )


class TooLong(BaseException):
    """What readers do not catch."""


def _late(*_: object) -> None:
    raise TooLong(f"it takes more than {SECONDS} seconds")


@contextmanager
def limited() -> Iterator[None]:
    """No more memory and time than a small file can need."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcomes(
    source: Path, damages: Mapping[str, Damage], load: Callable[[Path], Any], tmp_path: Path
) -> dict[str, str]:
    """What becomes of each damage: ``refused``, ``same``, ``other``, or what went wrong."""
    whole = load(source)
    found: dict[str, str] = {}
    for number, (name, damage) in enumerate(damages.items()):
        folder = tmp_path / str(number) / source.name
        shutil.copytree(source, folder)
        damage(folder)
        try:
            with limited():
                loaded = load(folder)
        except FxpruneError as error:
            told = error.what and error.where and error.remedy
            clear = told and "\n" not in str(error) and len(str(error)) <= LONGEST
            found[name] = "refused" if clear else f"unclear: {error!r}"
            if "defect of fxprune" in str(error):
                found[name] = f"defect: {error}"
        except BaseException as error:  # a reader may raise anything
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            found[name] = "same" if alike(whole, loaded) else "other"
        shutil.rmtree(tmp_path / str(number))
    return found


def load_dense(folder: Path) -> Any:
    return load_model(folder).state_dict()


def load_from_disk(folder: Path) -> Any:
    """As with weights that stay in their files."""
    with tempfile.TemporaryDirectory() as work:
        return load_mapped(next(folder.glob("*.gguf"), folder), Path(work)).state_dict()


def load_gguf(folder: Path) -> Any:
    return load_model(folder / GGUF).state_dict()


def load_header(folder: Path) -> Any:
    """As of a slim model, whose uneven blocks no reader but that of the format takes."""
    try:
        check_gguf(folder / GGUF)
        return read_header(folder / GGUF)
    except ValueError as error:  # what commands make of it
        raise FxpruneError(str(error), where=GGUF, remedy="Export it again") from error


def load_slim(folder: Path) -> Any:
    return fxprune.from_pretrained(folder, verify=True).state_dict()


def load_for_commands(folder: Path) -> Any:
    check_model(str(folder), with_weights=True)
    return [value.shape for value in load_config_only(folder).parameters()]


def load_words(folder: Path) -> Any:
    return load_tokenizer(folder)("a b, c")["input_ids"]


def load_plan(folder: Path) -> Any:
    written = read_plan(folder / "plan.json")
    axes, groups = (facts_of(grouped("llama", num_hidden_layers=1))[kind] for kind in (Dependencies, fxprune.Groups))
    keep = keep_of(axes.axes, groups.all, written.plan)
    return (
        dict(plan_of(axes.axes, keep, written.plan.removed_blocks).kept),
        dict(written.widths),
        written.parameters,
    )


def load_run(folder: Path) -> Any:
    context = click.Context(COMMAND.commands["prune"])  # type: ignore[attr-defined]
    read_config(context, folder / "run.yaml")
    return context.default_map


def load_data(folder: Path) -> Any:
    file = folder / f"data.{folder.name}"
    return calibration_text(file), read_text(file)


def load_scores(folder: Path) -> Any:
    scores = Scores.load(folder / "scores.safetensors")
    scores.check(facts_of(grouped("llama", num_hidden_layers=1))[fxprune.Groups].all)
    return scores.units


def load_recovery(folder: Path) -> Any:
    claim_folder(folder, {"rate": 0.1, "steps": 3})
    return str(last_checkpoint(folder) is not None)


def load_times(folder: Path) -> Any:
    return read_timing("decode", str(folder / "times.json"))


def all_of(*names: str) -> dict[str, Damage]:
    found: dict[str, Damage] = {}
    for name in names:
        found |= of_bytes(name) | (of_text(name) if not name.endswith((".safetensors", ".parquet", ".gguf")) else {})
    return found


def of_plan() -> dict[str, Damage]:
    name = "plan.json"
    odd = (None, 3, [], {}, "x", -1, True, 2**70)
    first = "model.layers.0.mlp.up_proj.weight"
    units = ([], [0], [0, 0], [-1], [10**9], [2**70], ["0"], [0.0], [None], list(range(88)), [5, 3, 1])
    found = {
        f"plan: {key} is {value!r}": field(name, key, value=value)
        for key in ("version", "kept", "removed_blocks", "sizes", "norm")
        for value in (*odd, ...)
    }
    found |= {
        f"plan: keeps {str(value)[:20]}": field(name, "kept", first, "0", value=value)
        for value in (*units, None, "01", {"0": 1})
    }
    found |= {
        f"plan: axis {axis!r}": field(name, "kept", first, axis, value=[0, 1])
        for axis in ("1", "2", "-1", "x", "00", "0 ", "99", "")
    }
    found |= {f"plan: size {value!r}": field(name, "sizes", first, "0", value=value) for value in (*odd, 87, 89)}
    found |= {
        f"plan: blocks {value!r}": field(name, "removed_blocks", value=value)
        for value in (["model.layers.0"], ["model.layers.7"], [3], ["model"], [""], "model.layers.0")
    }
    found["plan: one less"] = field(name, "kept", first)
    found["plan: a stranger"] = field(name, "kept", "nope.weight", value={"0": [0]})
    return found | {"plan: a key twice": twice(name, "kept", "{}")}


def of_run() -> dict[str, Damage]:
    name = "run.yaml"
    texts = (
        "ratio: [", "ratio: .nan", "ratio: !!python/object:os.system x", "ratio: 2020-13-45", "ratio: {a: {b: 1}}",
        "? [1]\n: 2", "ratio: 1\nratio: 2", "nope: 1", "ratio: yes", "protect: [1, x]", "- a", "ratio: *a",
        "a: &a [*a]",
        "ratio: '0.2", "\t", "%YAML 9", "ratio: 0x10", "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]", "ratio: 1:30",
        "--- 1\n--- 2", "1: 2", "null: 3", "ratio:\n", "kinds: [[mlp]]", "config: x",
    )  # fmt: skip
    return {f"run: {text!r}": content(name, text) for text in texts}


def of_times() -> dict[str, Damage]:
    odd = (None, "x", -1, 0, float("nan"), float("inf"), 1e400, [], {}, 2**70, 1e-300)
    places: tuple[tuple[Any, ...], ...] = (("dense",), ("slim",), ("slim", "decode_ms"), ("dense", "parameters"))
    return {
        f"times: {place} is {value!r}": field("times.json", *place, value=value) for place in places for value in odd
    }


# Whole sources


def whole_model(folder: Path, shard: str = "1GB") -> None:
    tiny("llama", **SIZES).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)


def pickled(folder: Path) -> None:
    model = tiny("llama", **SIZES)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def pruned(model: Any, ratio: float, data: Any = None) -> fxprune.Result:
    options: dict[str, Any] = {"importance": "l2", "kinds": "mlp", "protect": (), "compensate": "none"}
    return fxprune.prune(model, data, ratio=ratio, **options)


def slim(folder: Path, **options: Any) -> None:
    pruned(tiny("llama", **SIZES), 0.1, token_ids(2, 8)).save_pretrained(folder, tokenizer(), **options)


def in_one_file(folder: Path, model: Any, quantization: str) -> None:
    fxprune.export_model(model, folder / GGUF, tokenizer=tokenizer(), quantization=quantization)


def plan_and_report(folder: Path) -> None:
    made = pruned(model_of(grouped("llama", num_hidden_layers=1)), 0.2)
    (folder / "plan.json").write_text(made.plan.to_json())
    (folder / "report.json").write_text(made.report.to_json())


def run_of_recovery(folder: Path) -> None:
    (folder / "checkpoint-3").mkdir()
    (folder / "recovery.json").write_text('{"rate": 0.1, "steps": 3}')
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"step": 3}')


def scores(folder: Path) -> None:
    found = pruned(model_of(grouped("llama", num_hidden_layers=1)), 0.2).scores
    assert found is not None
    found.save(folder / "scores.safetensors")


def rows(folder: Path) -> None:
    data = [{"text": "A line of text.\nÄnother ü."}, {"text": "One more, 🙂."}]
    file = folder / f"data.{folder.name}"
    if folder.name == "parquet":
        datasets.Dataset.from_list(data).to_parquet(file)
        return
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
    text = "\n\n".join(row["text"] for row in data)
    file.write_text({"json": json.dumps(data), "jsonl": lines, "txt": text}[folder.name])


TIMES = {"dense": {"parameters": 100, "decode_ms": 9.0}, "slim": {"parameters": 70, "decode_ms": 7.0}}
RUN = "ratio: 0.2\nprotect: [1, 1]\nkinds: mlp,head\nuniform: true\nseed: 7\n"

SOURCES: dict[str, Callable[[Path], object]] = {
    "dense": whole_model,
    "shards": lambda folder: whole_model(folder, "6KB"),
    "bin": pickled,
    "slim": slim,
    "slim shards": lambda folder: slim(folder, max_shard_size="6KB"),
    "gguf": lambda folder: in_one_file(folder, tiny("llama", **SIZES), "f32"),
    "uneven": lambda folder: in_one_file(folder, uneven("llama"), "f16"),
    "plan": plan_and_report,
    "recovery": run_of_recovery,
    "scores": scores,
    "run": lambda folder: (folder / "run.yaml").write_text(RUN),
    "times": lambda folder: (folder / "times.json").write_text(json.dumps(TIMES)),
    **dict.fromkeys(("json", "jsonl", "txt", "parquet"), rows),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an undamaged source, made when it is first asked for."""
    top = tmp_path_factory.mktemp("sources")

    def made(name: str) -> Path:
        if not (top / name).exists():
            (top / name).mkdir()
            SOURCES[name](top / name)
        return top / name

    return made


CHECKED = (MANIFEST, "plan.json", "report.json", CONFIG, WEIGHTS, "generation_config.json", "tokenizer.json")
WORDS = ("tokenizer.json", "tokenizer_config.json")

REFUSED = {"refused"}
SAFE = REFUSED | {"same"}
ANY = SAFE | {"other"}

PROBES: dict[str, tuple[str, Callable[[Path], Any], Callable[[], dict[str, Damage]], set[str]]] = {
    "dense, config": ("dense", load_dense, of_config, ANY),
    "dense, tensors": ("dense", load_dense, of_tensors, ANY),
    "dense, bytes": ("dense", load_dense, lambda: all_of(CONFIG, WEIGHTS, "generation_config.json"), ANY),
    "dense on disk, config": ("dense", load_from_disk, of_config, ANY),
    "dense on disk, tensors": ("dense", load_from_disk, of_tensors, ANY),
    "dense for commands": ("dense", load_for_commands, lambda: of_config() | all_of(CONFIG), ANY),
    "shards": ("shards", load_dense, lambda: of_index() | all_of(INDEX), ANY),
    "pickled": ("bin", load_dense, lambda: of_bytes("pytorch_model.bin"), ANY),
    "words": ("dense", load_words, lambda: all_of(*WORDS), ANY),
    "slim, config": ("slim", load_slim, of_config, SAFE),
    "slim, tensors": ("slim", load_slim, of_tensors, SAFE),
    "slim, bytes": ("slim", load_slim, lambda: all_of(*CHECKED), SAFE),
    "slim, manifest": ("slim", load_slim, of_manifest, REFUSED),
    "slim, index": ("slim shards", load_slim, lambda: of_index() | all_of(INDEX), SAFE),
    "gguf": ("gguf", load_gguf, of_gguf, ANY),
    "gguf, bytes": ("gguf", load_gguf, lambda: of_bytes(GGUF), ANY),
    "gguf, uneven": ("uneven", load_header, lambda: of_bytes(GGUF), ANY),
    "gguf on disk": ("gguf", load_from_disk, of_gguf, ANY),
    "plan": ("plan", load_plan, lambda: of_plan() | all_of("plan.json", "report.json"), ANY),
    "recovery": ("recovery", load_recovery, lambda: all_of("recovery.json", "checkpoint-3/trainer_state.json"), ANY),
    "scores": ("scores", load_scores, lambda: of_bytes("scores.safetensors"), ANY),
    "run": ("run", load_run, lambda: of_run() | all_of("run.yaml"), ANY),
    "times": ("times", load_times, lambda: of_times() | all_of("times.json"), ANY),
    **{
        f".{kind}": (kind, load_data, lambda kind=kind: all_of(f"data.{kind}"), ANY)
        for kind in ("json", "jsonl", "txt", "parquet")
    },  # type: ignore[misc]
}
"""What is loaded, how, how it is damaged, and what may come of it."""

FIRST = ("slim, bytes", "slim, manifest", "scores", "times", "plan", ".jsonl")


@pytest.mark.parametrize("name", tiers(PROBES, *FIRST))
def test_damaged(sources: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    source, load, damages, allowed = PROBES[name]
    found = outcomes(sources(source), damages(), load, tmp_path)
    wrong = [f"{damage}: {what}" for damage, what in found.items() if what not in allowed]
    assert not wrong, "\n".join(wrong)
