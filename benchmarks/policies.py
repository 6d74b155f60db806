"""What each policy keeps of a real training, and what it takes. `python -m benchmarks.policies [folder [picture.svg]]`

The training of 100 epochs of `benchmarks.storage`, of which each policy is asked after every epoch what to keep.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import parser_of
from benchmarks.storage_samples import Trained, checkpoint_config, replay, storage_of, torch_save_bytes, train
from dino_exp.build import build_keep_policy
from dino_exp.checkpoint.reader import CheckpointReader

POLICIES = ("rotating", "best", "milestones", "compact", "incremental", "every_epoch")


@dataclass(frozen=True)
class Kept:
    """What is there at the end: epochs of whole and of thinned checkpoints, and the bytes after each epoch."""

    name: str
    whole: tuple[int, ...]
    thinned: tuple[int, ...]
    best: int | None
    num_bytes: tuple[int, ...]
    restore_secs: float


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("picture", type=Path, nargs="?")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        outputs = (asked.folder or Path(name)).resolve()
        trained = train(outputs / "long", 100)
        plain = torch_save_bytes(trained.state(trained.infos[-1].step))
        found = [kept_by(policy, trained, Path(name) / policy) for policy in POLICIES]
    print("| policy | whole | thinned | on the disk, in states of torch.save | restore |\n|---|---|---|---|---|")
    for kept in found:
        states = f"{kept.num_bytes[-1] / plain:.1f}"
        print(f"| {kept.name} | {len(kept.whole)} | {len(kept.thinned)} | {states} | {kept.restore_secs:.2f} s |")
    if asked.picture:
        draw(found, plain, asked.picture)


def kept_by(policy: str, trained: Trained, folder: Path) -> Kept:
    config = checkpoint_config(policy)
    sizes = tuple(size for _, size in replay(trained, folder, storage_of(config), build_keep_policy(config)))
    reader = CheckpointReader(folder)
    rows = reader.rows()
    state, began = trained.state(trained.infos[-1].step), time.perf_counter()
    reader.restore(state)
    return Kept(
        name=policy,
        whole=tuple(row["epoch"] for row in rows if row["resumable"]),
        thinned=tuple(row["epoch"] for row in rows if not row["resumable"]),
        best=next((row["epoch"] for row in rows if "best" in row["kinds"]), None),
        num_bytes=sizes,
        restore_secs=time.perf_counter() - began,
    )


def draw(found: Sequence[Kept], plain: int, path: Path) -> None:
    """Left, what is there after 100 epochs; right, what that takes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "policies", "font.size": 9}
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.1), width_ratios=(3, 1), sharey=True)
    for at, kept in enumerate(found):
        left.hlines(at, 1, 100, color="0.88", linewidth=1, zorder=0)
        left.plot(kept.whole, [at] * len(kept.whole), "o", color="C0", markersize=4.5)
        left.plot(kept.thinned, [at] * len(kept.thinned), "o", color="C0", markersize=4.5, markerfacecolor="white")
        if kept.best is not None:
            left.plot([kept.best], [at], "*", color="C1", markersize=9)
        states = kept.num_bytes[-1] / plain
        right.barh(at, states, height=0.5, color="C0")
        right.text(states + 1.5, at, f"{states:.1f}", va="center")
    left.set(yticks=range(len(found)), yticklabels=[kept.name for kept in found], xlabel="epoch", xlim=(-1, 103))
    left.invert_yaxis()
    left.set_title("kept after 100 epochs (hollow: the teacher only; star: the best)", fontsize=9, loc="left")
    right.set(xlabel="states of torch.save on the disk", xlim=(0, 118))
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
