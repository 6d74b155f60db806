"""What the codecs save and cost, on the states of real trainings. `python -m benchmarks.storage [folder]`

Two trainings of digits, of 30 and of 100 epochs (ViT of 0.8 million parameters, K = 4096, batch norm in the head), each
with a checkpoint after every epoch; they take 12 minutes on two cores, and none if the folder has them from an earlier
call. Then the state of ViT-S/16 with K = 65,536 and AdamW. Needs 6 GB of memory and 6 GB of disk.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks.checkpoint_samples import NamedTensors, save_request, vit_s_state
from benchmarks.measure import in_pairs, parser_of
from benchmarks.storage_samples import (
    Flat,
    Trained,
    array_of,
    least_share,
    mantissa_share,
    replay,
    replay_policy,
    train,
    zstd_bytes,
)
from dino_exp.checkpoint.blocks import BLOCK_BYTES, decode_block, encode_block
from dino_exp.checkpoint.choosing import choose
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.planes import Words
from dino_exp.checkpoint.policies import AnyOf, KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.storage import CODECS, Storage
from dino_exp.dino.parts import COMPANIONS

NUM_ROUNDS = 5
KEEP_ALL = KeepAny((LatestN(10**6),))
HEADER = "| what | measured | target |\n|---|---|---|"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # what a codec does on one core
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        outputs = asked.folder.resolve() if asked.folder else work
        short, long = train(outputs / "short", 30), train(outputs / "long", 100)
        print(HEADER)
        groups: dict[str, Callable[[Path], Iterator[str]]] = {
            "sizes": partial(size_rows, short),
            "speeds": partial(speed_rows, short),
            "policies": partial(policy_rows, long),
            "backup": partial(backup_rows, short),
            "large": large_rows,
        }
        for name, group in groups.items():
            began = time.perf_counter()
            for row in group(work / name):
                print(row, flush=True)
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


def line(what: str, measured: str, target: str = "–") -> str:
    return f"| {what} | {measured} | {target} |"


def size_rows(trained: Trained, folder: Path) -> Iterator[str]:
    raw = [trained.reader.manifest(info.step).content_bytes for info in trained.infos]
    tools = [zstd_bytes(trained.state(info.step)) / size for info, size in zip(trained.infos, raw, strict=True)]
    yield line("full state, zstd-3 on the bytes as they lie, of raw", f"{statistics.mean(tools):.3f}")
    for codec, target in (("zstd", "≤ 0.84"), ("delta", "≤ 0.74")):
        storage = Storage(codec=codec, companions=COMPANIONS)
        kept = [0, *(kept for _, kept in replay(trained, folder / codec, storage, KEEP_ALL))]
        shares = [(after - before) / size for (before, after), size in zip(pairwise(kept), raw, strict=True)]
        yield line(
            f"{codec}, mean over the run, manifests and chain cap included, of raw",
            f"{statistics.mean(shares):.3f}",
            target,
        )
        if codec == "zstd":
            yield from floor_rows(trained, CheckpointReader(folder / codec))
        else:
            third = shares[-len(shares) // 3 :]
            yield line("delta, the last third of the run, of raw", f"{statistics.mean(third):.3f}", "≤ 0.66")


def floor_rows(trained: Trained, stored: CheckpointReader) -> Iterator[str]:
    """How near that is to what any code for one state alone can do."""
    steps = [info.step for info in trained.infos]
    leasts = [least_share(trained.state(step), stored.manifest(step)) for step in steps]
    yield line(
        "the least for a state alone: upper 12 bits by their entropy, lower 20 as they are, teacher as stored",
        f"{statistics.mean(leasts):.3f}",
    )
    yield line(
        "lower two bytes of student and moments in mid-run by zstd-19, of their size",
        f"{mantissa_share(trained.state(steps[len(steps) // 2])):.4f}",
    )


def speed_rows(trained: Trained, folder: Path) -> Iterator[str]:
    """Of whole states laid end to end, in the middle of the run, so that calls do not count."""
    steps = [info.step for info in trained.infos[13:16]]
    before, now = trained.state(steps[0]), trained.state(steps[1])
    plain = [(words, []) for words in blocks(now)]
    delta = [(words, [other]) for words, other in zip(blocks(now), blocks(before), strict=True)]
    teacher = list(
        zip(
            blocks(now, "teacher."),
            blocks(before, "teacher."),
            blocks(now, "student."),
            blocks(before, "student."),
            strict=True,
        )
    )
    linear = [(words, [old, near, near_old]) for words, old, near, near_old in teacher]
    for what, cases, sets, targets in (
        ("byte planes + zstd", plain, [], ("≥ 350", "≥ 700")),
        ("delta against the epoch before", delta, [(0,)], ("≥ 250", "–")),
        ("teacher from itself and two students", linear, [(0,), (1,), (0, 1, 2)], ("≥ 250", "–")),
    ):
        for name, speed, target in zip(("encode", "decode"), speeds(cases * 4, sets), targets, strict=True):
            yield line(f"{name}, {what}, one core", f"{speed:.0f} MB/s", target)


def blocks(state: Flat, prefix: str = "") -> list[Words]:
    names = [
        name for name, tensor in sorted(state.tensors.items())
        if name.startswith(prefix) and tensor.dtype == torch.float32 and tensor.numel() > 1
    ]  # fmt: skip
    whole = np.concatenate([array_of(state.tensors[name]) for name in names]).view("<u4")
    return [whole[at : at + BLOCK_BYTES // 4] for at in range(0, len(whole), BLOCK_BYTES // 4)]


def speeds(cases: Sequence[tuple[Words, list[Words]]], sets: list[tuple[int, ...]]) -> tuple[float, float]:
    """Megabytes of content a second: encode, decode."""
    num_bytes = sum(words.nbytes for words, _ in cases)
    rounds = []
    for _ in range(NUM_ROUNDS):
        began = time.perf_counter()
        stored = [
            b"".join(encode_block(words, others, choose(words, others, "float32", sets))) for words, others in cases
        ]
        half = time.perf_counter()
        for data, (words, others) in zip(stored, cases, strict=True):
            decode_block(memoryview(data)[4:], others, "float32", np.empty_like(words))
        rounds.append((num_bytes / (half - began) / 1e6, num_bytes / (time.perf_counter() - half) / 1e6))
    return statistics.median(one for one, _ in rounds), statistics.median(other for _, other in rounds)


def policy_rows(trained: Trained, folder: Path) -> Iterator[str]:
    for name, target in (("rotating", "≤ 0.68"), ("compact", "≤ 0.45")):
        ratios = replay_policy(trained, folder / name, name)
        yield line(
            f"`checkpoint={name}` over {len(ratios)} epochs, bytes kept, against torch.save files: mean (at the end)",
            f"{statistics.mean(ratios):.3f} ({ratios[-1]:.3f})",
            target,
        )


def backup_rows(trained: Trained, folder: Path) -> Iterator[str]:
    """What a second backup sends after one new checkpoint, over that checkpoint's files and the index."""
    run = folder / "runs" / trained.run.name
    run.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(trained.run), str(run)], check=True)
    last = trained.infos[-1].step
    (manifest,) = (run / "checkpoints").glob(f"step-{last:09d}.json")
    packs = list((run / "checkpoints" / "packs").glob(f"step-{last:09d}.*"))
    aside = [(path, path.rename(folder / path.name)) for path in (manifest, *packs)]
    backup(run, folder / "target")
    for path, moved in aside:
        moved.rename(path)
    sent = backup(run, folder / "target")["bytes_sent"]
    new = sum(path.stat().st_size for path in (manifest, *packs))
    yield line(
        "second backup after one new checkpoint: bytes sent over that checkpoint's own",
        f"{sent / new:.3f}",
        "1, and an index",
    )


def backup(run: Path, target: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "dino_exp", "checkpoints", "backup", str(run), str(target), "--json"]
    found: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def large_rows(folder: Path) -> Iterator[str]:
    """The state of ViT-S/16: how long a training waits, how long a restore takes, by codec."""
    folder.mkdir()
    state = vit_s_state()
    buffers = {name: torch.empty_like(tensor) for name, tensor in state.tensors.items()}

    def copy() -> float:
        return timed(lambda: [buffers[name].copy_(tensor) for name, tensor in state.tensors.items()])

    torch_file = folder / "state.pt"
    torch.save(state.tensors, torch_file)
    restores = {"torch.load": lambda: timed(lambda: state.load_state_dict(torch.load(torch_file, weights_only=True)))}
    for codec in CODECS:
        manager = CheckpointManager(
            folder / codec,
            save=AnyOf(()),
            keep=KeepAny((LatestN(2),)),
            storage=Storage(codec=codec, companions=COMPANIONS),
        )
        saves = Saves(manager, state)
        blocked = in_pairs(saves.blocked_secs, copy, num_pairs=NUM_ROUNDS)
        yield line(
            f"training blocked for a save, {codec}, over a copy into existing buffers", f"{blocked.ratio:.2f}", "≤ 1.3"
        )
        yield line(
            f"whole save in the background, {codec}, synced and read back",
            f"{statistics.median(saves.whole_secs):.1f} s",
        )
        restores[codec] = partial(timed, partial(manager.restore, state))
    rounds = [{name: restore() for name, restore in restores.items()} for _ in range(3)]
    for name in restores:
        secs = statistics.median(one[name] for one in rounds)
        ratio = statistics.median(one[name] / one["torch.load"] for one in rounds)
        yield line(f"restore of 701 MB, {name}: seconds, over torch.load", f"{secs:.2f} s, {ratio:.2f}")


class Saves:
    """One manager's saves of a state that moves a little each time, as a training's does."""

    def __init__(self, manager: CheckpointManager, state: NamedTensors) -> None:
        self._manager, self._state, self._step = manager, state, 0
        self.whole_secs: list[float] = []

    def blocked_secs(self) -> float:
        self._step += 1
        with torch.no_grad():
            for name, tensor in self._state.tensors.items():
                if tensor.is_floating_point():
                    tensor.mul_(1 + 1e-4 * (1 + name.startswith("teacher.")))
        began = time.perf_counter()
        self._manager.save(self._state, save_request(self._step))
        blocked = time.perf_counter() - began
        self._manager.drain()
        self.whole_secs.append(time.perf_counter() - began)
        return blocked


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
