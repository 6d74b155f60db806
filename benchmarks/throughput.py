"""How fast DINO trains: our step against that of the official code, and the whole training against the bare step.

ViT-S/16, two crops of 224 and eight of 96 pixels, K = 65,536. Both sides, each in a process of its own, begin with the
same weights and see the same crops, in turn; a ratio is the median over the pairs. On CUDA (`--device cuda`) the batch
is larger, our side is as free of deterministic operations as the official one, what they cost is a table of its own,
and what the card's matrix units give in a plain product is measured beside.
`python -m benchmarks.throughput --official <checkout of facebookresearch/dino>`
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import HEADER, Pairs, in_pairs, timed
from benchmarks.official import official_modules
from benchmarks.sides import CORES, Side
from benchmarks.steps import GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL, OfficialStep, Ours, Recipe, crops_of
from dino_exp import build
from dino_exp.training.step import train_step

GFLOP_PER_IMAGE = 113.8  # forward and backward, both networks (anchors of the project)
FREE = "runtime.deterministic=false"
TARGETS = {"fp32": 1.1, "bf16": 1.3, "fp16": 1.0}
PARTS = {"cpu": ("losses", "fp32", "bf16", "training")}
PARTS["cuda"] = (*PARTS["cpu"], "deterministic")
AGREE_BATCH, AGREE_STEPS, AGREE_WITHIN = 2, 20, 1e-4


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of facebookresearch/dino")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="images of a step; default 8 on a CPU, 256 on CUDA")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--parts", help=f"which tables, with commas between; default {','.join(PARTS['cpu'])}")
    parser.add_argument("--words", nargs="*", default=[], help="settings of ours, such as runtime.compile=true")
    asked = parser.parse_args()
    torch.set_num_threads(CORES)
    parts = asked.parts.split(",") if asked.parts else PARTS[asked.device]
    known = {*PARTS["cuda"], *TARGETS}
    if unknown := set(parts) - known:
        parser.error(f"--parts {','.join(sorted(unknown))}: expected some of {', '.join(sorted(known))}")
    batch = asked.batch or (256 if asked.device == "cuda" else 8)
    free = (FREE,) if asked.device == "cuda" else ()
    recipe = Recipe(batch=batch, device=asked.device, words=(*free, *asked.words))
    for part in parts:
        if part == "losses":
            _agreement(asked.official, asked.device)
        elif part == "training":
            for precision in ("fp32", "bf16"):
                _training(replace(recipe, precision=precision), asked.pairs)
        elif part == "deterministic":
            for precision in ("fp32", "bf16"):
                bound = replace(recipe, precision=precision, words=tuple(asked.words))
                _deterministic(asked.official, bound, asked.pairs)
        else:
            _steps(asked.official, replace(recipe, precision=part), asked.pairs)
    if asked.device == "cuda":
        _plain_product()


def _agreement(checkout: Path, device: str) -> None:
    """The losses of the first steps, from the same weights on the same crops."""
    # Not deterministic: CUDA has no such gradient of the official code's resized positions. And the convolution that
    # cuts its patches would be in TF32.
    recipe = Recipe(batch=AGREE_BATCH, device=device, drop_path=0.0, words=(FREE,))
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    theirs, ours = OfficialStep(official_modules(checkout), recipe), Ours(recipe, read_every=1)
    ours.load(theirs)
    worst = 0.0
    for number in range(AGREE_STEPS):
        crops = crops_of(recipe, seed=number)
        expected, found = theirs.step(crops), ours.step(crops)
        assert found is not None
        worst = max(worst, abs(found - expected) / abs(expected))
    print(f"\nlosses of {AGREE_STEPS} steps in fp32, largest relative difference: {worst:.1e} (≤ {AGREE_WITHIN:.0e})")


def _steps(checkout: Path, recipe: Recipe, num_pairs: int) -> None:
    """Times and peak memory of both sides, each in a process of its own."""
    with Side("official", checkout, recipe) as theirs, Side("ours", checkout, recipe) as ours:
        theirs.warm_up()
        ours.warm_up()
        pairs = in_pairs(theirs.step, ours.step, num_pairs=num_pairs)
        peaks = theirs.peak(), ours.peak()
    _report(f"step, {recipe.precision}: official", "ours", pairs, f"≥ {TARGETS[recipe.precision]}", recipe)
    print(
        f"peak memory: {peaks[0] / 1e9:.2f} and {peaks[1] / 1e9:.2f} GB: {peaks[1] / peaks[0]:.2f} (≤ 0.85)", flush=True
    )


def _deterministic(checkout: Path, recipe: Recipe, num_pairs: int) -> None:
    """What deterministic operations cost: our step with them, and without."""
    free = replace(recipe, words=(FREE, *recipe.words))
    with Side("ours", checkout, recipe) as bound, Side("ours", checkout, free) as unbound:
        bound.warm_up()
        unbound.warm_up()
        pairs = in_pairs(bound.step, unbound.step, num_pairs=num_pairs)
    _report(f"step, {recipe.precision}: deterministic", "not", pairs, "–", recipe)


def _report(a: str, b: str, pairs: Pairs, target: str, recipe: Recipe) -> None:
    rates = [recipe.batch / statistics.median(secs) for secs in (pairs.a_secs, pairs.b_secs)]
    print(f"\n{HEADER}\n{pairs.line(a, b, target)}")
    print(f"images a second: {rates[0]:.2f} and {rates[1]:.2f}; batch {recipe.batch}, {recipe.device}", flush=True)


def _training(recipe: Recipe, num_pairs: int) -> None:
    """Loading (two workers), augmentation and step, as the loop has them, against the step on crops that are there."""
    config = recipe.config()
    data = build.build_data(config.data)
    augment = build.build_augment(config)
    bare, whole = Ours(recipe), Ours(recipe)
    crops = crops_of(recipe)
    with build.build_batches(config, data.train, 0) as batches:
        stream = build.build_prefetch(batches, whole.device)

        def step() -> None:
            train_step(whole.state, next(stream), augment=augment, schedules=whole.schedules, rule=whole.rule)

        pairs = in_pairs(timed(lambda: bare.step(crops), bare.wait), timed(step, whole.wait), num_pairs=num_pairs)
    _report(f"bare step, {recipe.precision}", "with data", pairs, "≥ 0.95", recipe)


def _plain_product(side: int = 8192, repeats: int = 20) -> None:
    """What the card gives in a plain product of matrices in bf16, and what 43 % of it would mean for the recipe."""
    one = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    for _ in range(repeats):
        one @ one
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        one @ one
    torch.cuda.synchronize()
    tera = 2 * side**3 * repeats / (time.perf_counter() - started) / 1e12
    print(
        f"\na plain product in bf16: {tera:.0f} TFLOP/s; 43 % of it: {0.43 * tera * 1e3 / GFLOP_PER_IMAGE:.0f} images/s"
    )
    print(f"({GFLOP_PER_IMAGE} GFLOP an image: 2 × {GLOBAL_SIZE} px and {NUM_LOCAL} × {LOCAL_SIZE} px)")


if __name__ == "__main__":
    main()
