"""A random process is killed at a random time; the same command, by any number of processes, ends as if it had not.

``python -m tests.end_to_end.test_killed_processes --kills 20`` kills as often as is said.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import fxprune
from fxprune.checkpoint.low_memory import load_mapped
from fxprune.offload import files, prefetch
from tests.models import tiny, token_ids

OPTIONS = {
    "importance": "taylor{order=mix, memory=low}",
    "compensate": "least-squares{reach=stream}",
    "tune": "tune{epochs=3, measurements=3, precision=float32, weights=True}",
    "recipe": "balanced",
    "ratio": 0.3,
}


def start(count: int, work: Callable[[], object], meeting: Path) -> list[ForkProcess]:
    """Processes in one group, which do some work."""

    def run(rank: int) -> None:
        dist.init_process_group("gloo", f"file://{meeting}", timedelta(seconds=240), world_size=count, rank=rank)
        work()

    meeting.unlink(missing_ok=True)
    processes = [mp.get_context("fork").Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def end(processes: list[ForkProcess]) -> bool:
    """Wait for processes; if one fails, end the others, as torchrun does. Whether all were done."""
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
        time.sleep(0.02)
    for process in processes:
        process.join()
    return not any(process.exitcode for process in processes)


def kill_and_resume(folder: Path, kills: int, seed: int) -> list[str]:
    """Kill as many runs as is said, of one to three processes each; what was seen, kill by kill."""
    draw, seen = random.Random(seed), list[str]()
    tiny("llama").save_pretrained(folder / "dense", max_shard_size="100KB")
    fxprune.trace(load_mapped(folder / "dense", folder))  # for all forks

    def prune(out: Path) -> None:
        files.SMALLEST = 0  # weights that are trained are in files, from which they are taken up
        prefetch.SMALLEST = 0  # of small weights too, each process reads a share
        fxprune.prune_checkpoint(folder / "dense", out, token_ids(9, 12), **OPTIONS)

    begun = time.monotonic()
    assert end(start(1, lambda: prune(folder / "whole"), folder / "meeting"))
    longest = time.monotonic() - begun
    wanted = load_file(folder / "whole/model.safetensors")
    out = folder / "slim"
    for number in range(kills):
        count = draw.choice((2, 3)) if number else 2
        processes, wait = start(count, lambda: prune(out), folder / "meeting"), draw.uniform(0.1, 0.9) * longest
        until = time.monotonic() + wait
        while time.monotonic() < until and any(process.is_alive() for process in processes):
            time.sleep(0.02)
        victim = draw.randrange(count)
        processes[victim].kill()
        whole = end(processes)
        work = folder / "slim.unfinished"
        left = sorted(path.name for path in work.rglob("*") if path.is_file()) if work.exists() else []
        assert whole or not out.exists() or fxprune.from_pretrained(out), "whole or not there"
        again = draw.choice((1, 2, 3))
        if not out.exists():
            assert end(start(again, lambda: prune(out), folder / "meeting"))
        found = load_file(out / "model.safetensors")
        assert found.keys() == wanted.keys() and not work.exists()
        worst = max(float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in wanted.items())
        assert worst <= 1e-5, f"{worst:.1e}"
        plans = [fxprune.Plan.from_json((place / "plan.json").read_text()) for place in (out, folder / "whole")]
        assert plans[0] == plans[1]
        fate = "was done" if whole else f"died with {len(left)} files left"
        seen.append(f"kill {number + 1}: process {victim} of {count} after {wait:.1f} s, which {fate}; {again} went on")
        shutil.rmtree(out)
    return seen


@pytest.mark.slow
def test_a_killed_run_is_resumed_by_any_number_of_processes(tmp_path: Path) -> None:
    """One missing part in the folder of one process ended in a reset connection at every restart."""
    seen = kill_and_resume(tmp_path, 3, 0)
    assert any("died with" in line for line in seen)


@pytest.mark.slow
def test_parts_scored_by_two_processes_are_not_those_of_one_that_cuts_the_graph_elsewhere(tmp_path: Path) -> None:
    """The scores of two processes were taken for those of parts of the same numbers."""
    tiny("llama").save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    fxprune.trace(load_mapped(tmp_path / "dense", tmp_path))  # for all forks
    options = {**OPTIONS, "compensate": "none", "tune": "none", "ranking": "local"}

    def prune(out: str) -> None:
        prefetch.SMALLEST = 0
        fxprune.prune_checkpoint(tmp_path / "dense", tmp_path / out, token_ids(9, 12), **options)

    assert end(start(1, lambda: prune("whole"), tmp_path / "meeting"))
    processes = start(2, lambda: prune("slim"), tmp_path / "meeting")
    while not list(tmp_path.glob("slim.unfinished/*/part-*-15.safetensors")):
        time.sleep(0.002)
    processes[1].kill()
    assert not end(processes) and end(start(1, lambda: prune("slim"), tmp_path / "meeting"))
    plans = [fxprune.Plan.from_json((tmp_path / out / "plan.json").read_text()) for out in ("slim", "whole")]
    assert plans[0] == plans[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print("\n".join(kill_and_resume(Path(place), chosen.kills, chosen.seed)))
