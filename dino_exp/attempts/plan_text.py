"""The plan of a training in words: a few blocks of facts, and warnings where something will not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dino_exp.attempts.planning import Forecast, forecast
from dino_exp.attempts.target import Target
from dino_exp.dino.costs import NUM_GLOBAL, forward_flops, usual_step_flops
from dino_exp.loggers.console import print_facts
from dino_exp.words import count_text, duration_text, size_text

if TYPE_CHECKING:
    from rich.console import Console

Rows = list[tuple[str, str]]

SPARE = 1.1  # what is estimated may be a tenth more


def tell_plan(target: Target, console: Console) -> None:
    """Make the plan of what the command would do, and print it."""
    found = forecast(target)
    title = f"Plan of {target.paths.directory.name}. Nothing was written"
    blocks: dict[str, Rows] = {
        title: _run(target, found),
        "Model": _model(found),
        "Memory": _memory(found),
        "Time": _time(found),
        "Checkpoints": _checkpoints(target, found),
    }
    for heading, rows in blocks.items():
        print_facts(console, heading, rows)
    for text in warnings(found):
        console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def _run(target: Target, found: Forecast) -> Rows:
    plan, config = found.plan, target.config
    begins = "a new run" if found.start_step == 0 else f"goes on from step {found.start_step:,}"
    threads = f", {count_text(found.threads, 'thread')}" if found.device.type == "cpu" else ""
    workers = config.runtime.workers
    loading = f", {count_text(workers, 'process')}" if workers == 1 else f", {workers} processes"
    loading = f"{loading} {'loads' if workers == 1 else 'load'} the data" if workers else ""
    stop = "" if plan.stop_step == plan.horizon_steps else f", stopping at {plan.stop_step:,}"
    parts = "" if found.at_once == plan.batch_size else f", {found.at_once} at once"
    return [
        ("begins", begins),
        ("directory", str(target.paths.directory)),
        ("device", f"{found.device}{threads}, {config.train.precision}{loading}"),
        ("data", f"{config.data.name}, {count_text(found.num_images, 'image')}, {plan.batch_size} a step{parts}"),
        ("steps", f"{plan.horizon_steps:,} in {config.train.epochs} epochs of {plan.steps_per_epoch:,}{stop}"),
        ("to do", count_text(max(plan.stop_step - found.start_step, 0), "step")),
    ]


def _model(found: Forecast) -> Rows:
    dims, parameters = found.dims, found.parameters
    crops = f"{NUM_GLOBAL} x {dims.global_size} and {dims.num_local} x {dims.local_size} pixels"
    num_images = max(found.plan.stop_step - found.start_step, 0) * found.plan.batch_size
    return [
        (
            "parameters",
            f"backbone {parameters.backbone:,}, head {parameters.head:,}; {parameters.trained:,} are trained",
        ),
        ("forward", f"{flop_text(forward_flops(dims))} an image, {crops}"),
        ("training", f"{flop_text(found.step_flops)} an image: teacher, student and backward"),
        ("as others count", f"{flop_text(usual_step_flops(dims))} an image: with every token in the last block"),
        ("all to do", flop_text(num_images * found.step_flops)),
    ]


def _memory(found: Forecast) -> Rows:
    memory = found.memory
    has = "unknown" if found.device_bytes is None else f"{size_text(found.device_bytes)} are free"
    rows = [
        ("models", f"{size_text(memory.weights)} student, {size_text(memory.teacher)} teacher"),
        ("optimizer", f"{size_text(memory.moments)} moments, {size_text(memory.gradients)} gradients"),
        ("activations", f"{size_text(memory.passing)} with crops and loss, of {found.at_once} images"),
        ("at once", f"{size_text(memory.peak)} on {found.device}, of tensors and to about 10 %; {has}"),
    ]
    if found.snapshot_bytes:
        free = "" if found.ram_bytes is None else f"; {size_text(found.ram_bytes)} of main memory are free"
        rows.append(("a save", f"{size_text(found.snapshot_bytes)} copy while it is being written{free}"))
    return rows


def _time(found: Forecast) -> Rows:
    pace, plan = found.pace, found.plan
    if pace is None:
        return [("a step", found.unmeasured)]
    rate = plan.batch_size / pace.secs_per_step
    flops = rate * found.step_flops
    rows = [
        ("a step", f"{secs_text(pace.secs_per_step)}, the mean of {pace.num_steps}, loading included"),
        ("speed", f"{rate:,.4g} images a second, {flop_text(flops)}/s"),
    ]
    if found.evaluations:
        how = "by their operations" if found.evaluation_secs is None else "as one took"
        secs = secs_text(evaluation_secs(found))
        rows.append(("evaluations", f"{len(found.evaluations)} of about {secs}, {how}"))
    if found.cache is not None:
        about = f"about {size_text(found.cache.num_bytes)}"
        rows.insert(0, ("the cache", f"is made first, {about}, of all images; the steps below had none"))
    rows.append(("to the stop", f"about {duration_text(secs_to(found, plan.stop_step))}"))
    if plan.stop_step < plan.horizon_steps:
        rows.append(("to the horizon", f"about {duration_text(secs_to(found, plan.horizon_steps))}"))
    return rows


def _checkpoints(target: Target, found: Forecast) -> Rows:
    kept, here = found.checkpoints.kept, found.checkpoints
    thin = f" and {kept.thin} thinned ones of {size_text(here.thin_bytes)}" if kept.thin else ""
    codec = target.config.checkpoint.storage.codec
    less = "" if codec == "raw" else f" before {codec} makes it smaller"
    present = f", {here.present} are there" if here.present else ""
    return [
        ("saved", f"{here.saves:,} times at most{present}"),
        ("kept", f"{kept.whole:,} at most, {size_text(here.each_bytes)} each{less}{thin}"),
        ("on disk", f"{size_text(here.most_bytes)} at most; {size_text(here.free_bytes)} are free"),
    ]


def warnings(found: Forecast) -> Iterator[str]:
    """What will not fit, each with what can be done about it."""
    need, here = found.device_need, found.checkpoints
    if found.device_bytes is not None and need * SPARE > found.device_bytes:
        yield (
            f"memory: about {size_text(need)} at once, and {found.device} has {size_text(found.device_bytes)} free; "
            "raise train.accumulate, or lower train.batch_size or loss.out_dim"
        )
    elif found.ram_bytes is not None and found.snapshot_bytes > found.ram_bytes:
        yield (
            f"memory: a save needs a copy of {size_text(found.snapshot_bytes)}, and {size_text(found.ram_bytes)} are "
            "free; checkpoint.storage.background=false needs none"
        )
    if here.needed_bytes > here.free_bytes:
        yield (
            f"disk: checkpoints may take {size_text(here.needed_bytes)} more, and {size_text(here.free_bytes)} are "
            "free; lower checkpoint.keep.last, or set checkpoint.keep.thin=teacher or another paths.outputs"
        )
    if found.cache is not None and found.cache.num_bytes > found.cache.free_bytes:
        yield (
            f"disk: the cache takes about {size_text(found.cache.num_bytes)}, and {size_text(found.cache.free_bytes)} "
            "are free there; paths.cache=<folder>, data.cache=false, or a smaller data.decode_size"
        )
    if found.pace is not None and found.secs_left is not None:
        needed = secs_to(found, found.plan.stop_step)
        if needed > found.secs_left:
            yield (
                f"time: about {duration_text(needed)} to the stop, and the machine is there for "
                f"{duration_text(max(found.secs_left, 0))}; the same command goes on where it was stopped, about "
                f"{-(-needed // max(found.secs_left, 1)):.0f} times in all"
            )


def evaluation_secs(found: Forecast) -> float:
    """About how long one takes: as one did, or if it comes to as many operations a second as the steps."""
    if found.evaluation_secs is not None:
        return found.evaluation_secs
    assert found.pace is not None
    step = found.plan.batch_size * found.step_flops
    return found.pace.secs_per_step * found.evaluation_flops / step


def secs_to(found: Forecast, stop_step: int) -> float:
    """About how long the training takes to a step, with its evaluations; saves are written beside it."""
    assert found.pace is not None
    plan = found.plan
    num_evaluations = len(found.evaluations)
    if stop_step > plan.stop_step and plan.evaluate_every_epochs is not None:
        num_evaluations += -(-(stop_step - plan.stop_step) // (plan.evaluate_every_epochs * plan.steps_per_epoch))
    steps = max(stop_step - found.start_step, 0)
    return steps * found.pace.secs_per_step + num_evaluations * evaluation_secs(found)


def flop_text(flops: float) -> str:
    """`113.8 GFLOP`."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 1000:
            return f"{flops:.4g} {unit}FLOP"
        flops /= 1000
    return f"{flops:,.4g} EFLOP"


def secs_text(secs: float) -> str:
    """Also less than a second: `24.1 ms`, `3.2 s`, `2m 10s`."""
    if secs < 1:
        return f"{secs * 1e3:.3g} ms"
    return f"{secs:.3g} s" if secs < 60 else duration_text(secs)
