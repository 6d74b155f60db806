"""`dino-exp checkpoints evolution|compare|timeline`: what became of a run's weights, and of the run.

Numpy is imported only by those who ask: `checkpoints list` shall not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dino_exp.analysis.style import check_suffix
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunArgument, RunAtArgument, named, named_run
from dino_exp.cli.progress import progress
from dino_exp.cli.show import Cell, plain, print_json, print_table
from dino_exp.config.typed import setting_text
from dino_exp.errors import NoCheckpointError, UsageError
from dino_exp.runs.jsontext import spell
from dino_exp.words import count_text, moment_text, size_text

if TYPE_CHECKING:
    from dino_exp.analysis.comparison import Comparison, TensorDifference
    from dino_exp.analysis.evolution import Moment
    from dino_exp.analysis.timeline import Timeline

PictureOption = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE", help="Draw it, too: .svg, .png or .pdf.")
]
_MEASURES = (
    "student_norm", "change", "relative_change", "teacher_norm", "distance", "cosine", "first_moment", "second_moment",
)  # fmt: skip
_HEADS = ("norm", "change", "relative", "teacher", "distance", "cosine", "1st moment", "√ 2nd")
_SHOWN = 20
_TOTAL = "total"
_OPTIMIZER = "optimizer"


class ByChoice(StrEnum):
    """By what differences are ranked."""

    RELATIVE = "relative"
    CHANGE = "change"
    COSINE = "cosine"


def evolution(
    run: RunArgument,
    block: Annotated[
        str, typer.Option("--block", help="Of one block only, such as backbone.blocks.3 or head.last_layer.")
    ] = _TOTAL,
    weight: Annotated[
        list[str],
        typer.Option("--weight", metavar="NAME", help="Measure the rank of this weight; may be repeated."),
    ] = [],  # noqa: B006  # typer wants a list, and makes a new one each time
    picture: PictureOption = None,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """How the weights have moved over the kept checkpoints: norms, changes, student and teacher, moments, rank.

    Reads every byte of them, one tensor at a time. `relative` is the change since
    the checkpoint before; the rank is measured of the attention of the first,
    middle and last block and of the prototypes, unless --weight says otherwise.

    \b
    Examples:
      dino-exp checkpoints evolution last
      dino-exp checkpoints evolution last --block head.last_layer --picture evolution.svg
      dino-exp checkpoints evolution vit_s-67b8 --weight backbone.blocks.11.mlp.fc1.weight --json
    """
    from dino_exp.analysis.analyzer import CheckpointAnalyzer

    if picture is not None:
        check_suffix(picture, "--picture")
    wanted = named_run(run, outputs, "evolution")
    analyzer = CheckpointAnalyzer(wanted.paths.directory)
    with progress("reading", quiet=as_json) as bar:
        bar.expect(sum(row["content_bytes"] for row in analyzer.listing.rows))
        moments = list(analyzer.evolution(weights=weight or None, progress=bar.heard))
    _check_names(moments, block, weight)
    if picture is not None:
        from dino_exp.analysis.figures.evolution import draw_evolution

        draw_evolution(moments).save(picture)
    if as_json:
        print_json([spell(moment.as_json()) for moment in moments])
        return
    if not moments:
        print("no checkpoints yet")
        _tell_picture(picture)
        return
    lines = [_moment_line(moment, block) for moment in moments]
    print_table(("step", "epoch", *_HEADS, "dead"), lines, right=("step", "epoch", *_HEADS, "dead"))
    _tell_spectra(moments)
    for moment in moments:
        if moment.problem is not None:
            print(f"step {moment.step} is damaged: {plain(moment.problem)}")
    _tell_picture(picture)


def _check_names(moments: Sequence[Moment], block: str, weights: Sequence[str]) -> None:
    """Raises UsageError for a block or weight that no checkpoint has."""
    blocks = list(dict.fromkeys(name for moment in moments for name in moment.blocks))
    if blocks and block != _TOTAL and block not in blocks:
        raise UsageError(f"--block {block}: no such block; there are {', '.join(blocks)}")
    measured = {name for moment in moments for name in moment.spectra}
    missing = [name for name in weights if name not in measured]
    if missing and any(moment.problem is None for moment in moments):
        raise UsageError(
            f"--weight {missing[0]}: no such weight matrix; names are those of `dino-exp checkpoints show --tensors`, "
            "without student., such as backbone.blocks.0.attn.qkv.weight"
        )


def _moment_line(moment: Moment, block: str) -> tuple[Cell, ...]:
    measured = moment.total if block == _TOTAL else moment.blocks.get(block)
    numbers = [_number(getattr(measured, name, None)) for name in _MEASURES]
    dead = "–" if moment.dead_prototypes is None else f"{moment.dead_prototypes} of {moment.num_prototypes}"
    epoch = "–" if moment.epoch is None else str(moment.epoch)
    return str(moment.step), epoch, *numbers, "damaged" if moment.problem else dead


def _tell_spectra(moments: Sequence[Moment]) -> None:
    lines = []
    for name in dict.fromkeys(name for moment in moments for name in moment.spectra):
        found = [moment.spectra[name] for moment in moments if name in moment.spectra]
        first, last = found[0], found[-1]
        ranks = (f"{first.effective_rank:.4g}", f"{last.effective_rank:.4g}")
        lines.append((name, *ranks, f"{first.spectral_norm:.4g}", f"{last.spectral_norm:.4g}"))
    if lines:
        print()
        columns = ("weight", "effective rank, first", "last", "spectral norm, first", "last ")
        print_table(columns, lines, right=columns[1:])


def compare(
    a: RunAtArgument,
    b: RunAtArgument,
    part: Annotated[
        str | None,
        typer.Option("--part", help="Only tensors of student, teacher, optimizer or loss; else all but the optimizer."),
    ] = None,
    by: Annotated[ByChoice, typer.Option("--by", help="What is largest: relative or absolute change, or angle.")] = (
        ByChoice.RELATIVE
    ),
    limit: Annotated[int, typer.Option("--limit", min=0, help="At most so many lines in the table; 0: all.")] = _SHOWN,
    picture: PictureOption = None,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Compare two checkpoints, of one run or of two: each tensor's change, metrics, settings; the largest first.

    Without @ a run means its latest checkpoint. Changes are from A to B.

    \b
    Examples:
      dino-exp checkpoints compare last@best last@latest
      dino-exp checkpoints compare vit_s-67b8@1000 vit_s-9f01@1000 --part teacher
      dino-exp checkpoints compare last@220 last@990 --by cosine --limit 0 --picture compare.png
    """
    from dino_exp.analysis.analyzer import CheckpointAnalyzer
    from dino_exp.analysis.comparison import largest_first

    if picture is not None:
        from dino_exp.analysis.figures.comparison import PARTS, draw_comparison

        check_suffix(picture, "--picture")
        if part not in (None, *PARTS):
            raise UsageError(f"--part {part}: a picture shows the layers of {' or '.join(PARTS)}; leave out --picture")
    one, other = named(a, outputs), named(b, outputs)
    first, second = CheckpointAnalyzer(one.paths.directory), CheckpointAnalyzer(other.paths.directory)
    with progress("reading", quiet=as_json) as bar:
        for run, at in ((first, one.at), (second, other.at)):
            step = run.reader.resolve(at or "latest")
            bar.expect(sum(row["content_bytes"] for row in run.listing.rows if row["step"] == step))
        try:
            found = first.compare(one.at or "latest", second, other.at or "latest", bar.heard)
        except FileNotFoundError as gone:
            raise NoCheckpointError(f"{gone.filename}: a training has dropped it meanwhile; type it again") from gone
    hidden = _OPTIMIZER if part is None else None
    tensors = [tensor for tensor in found.tensors if part in (None, tensor.part) and tensor.part != hidden]
    if not tensors and found.tensors:
        parts = ", ".join(dict.fromkeys(tensor.part for tensor in found.tensors))
        raise UsageError(f"--part {part}: no tensor of it in either; there are {parts}")
    if picture is not None:
        draw_comparison(found, part).save(picture)
    if as_json:
        told = tensors if part is not None else found.tensors
        print_json(spell({**found.as_json(), "tensors": [one.as_json() for one in largest_first(told, by.value)]}))
        return
    _print_comparison(found, largest_first(tensors, by.value), limit)
    moved = sum(tensor.part == hidden and not tensor.is_equal for tensor in found.tensors)
    if moved:
        print(f"\n{count_text(moved, 'tensor')} of the optimizer differ, too; they: --part optimizer")
    _tell_picture(picture)


def _print_comparison(found: Comparison, tensors: Sequence[TensorDifference], limit: int) -> None:
    for letter, facts in (("A", found.a), ("B", found.b)):
        print(plain(f"{letter}: step {facts['step']} (epoch {facts['epoch']}) of {facts['run_key'] or '–'}"))
    print()
    if all(tensor.is_equal for tensor in tensors):
        print(f"all {count_text(len(tensors), 'tensor')} are equal")
    else:
        differing = [tensor for tensor in tensors if not tensor.is_equal]
        shown = differing[: limit or None]
        columns = ("tensor", "relative", "change", "cosine", "largest", "")
        print_table(columns, list(map(_difference_line, shown)), right=columns[1:5])
        if len(shown) < len(differing):
            print(f"{len(shown)} of {count_text(len(differing), 'tensor')} that differ; all: --limit 0")
        equal = len(tensors) - len(differing)
        if equal:
            print(f"{count_text(equal, 'tensor')} equal")
    for title, rows in (("metric", found.metrics), ("setting", found.settings), ("origin", found.origin)):
        if rows:
            print()
            print_table((title, "A", "B"), [(row["key"], _text(row["a"]), _text(row["b"])) for row in rows])


def _difference_line(one: TensorDifference) -> tuple[Cell, ...]:
    told = one.problem or ("" if one.only_in is None else f"only in {one.only_in.upper()}")
    return one.name, _number(one.relative), _number(one.change), _number(one.cosine), _number(one.largest), told


def timeline(
    run: RunArgument,
    everything: Annotated[bool, typer.Option("--all", help="Also checkpoints that were dropped.")] = False,
    picture: PictureOption = None,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """What happened to a run: attempts, kills, saves and why they are kept, deletions and why, mishaps.

    \b
    Examples:
      dino-exp checkpoints timeline last
      dino-exp checkpoints timeline last --all
      dino-exp checkpoints timeline vit_s-67b8 --picture timeline.svg
    """
    from dino_exp.analysis.analyzer import CheckpointAnalyzer

    if picture is not None:
        check_suffix(picture, "--picture")
    analyzer = CheckpointAnalyzer(named_run(run, outputs, "timeline").paths.directory)
    made = analyzer.timeline()
    if picture is not None:
        from dino_exp.analysis.figures.timeline import draw_timeline

        series = analyzer.history.series(analyzer.metric)
        draw_timeline(made, analyzer.metric, series, analyzer.record.best).save(picture)
    if as_json:
        print_json(spell(made.as_json()))
        return
    print_table(("time, UTC", "step", "what", ""), _timeline_lines(made, everything), right=("step",))
    gone = [save for save in made.saves if not save.is_here]
    here = [save for save in made.saves if save.is_here]
    size = size_text(sum(save.alone_bytes for save in here))
    dropped = "" if everything or not gone else f", {len(gone)} dropped (--all shows them)"
    print(f"{count_text(len(made.spans), 'attempt')}; {count_text(len(here), 'checkpoint')} here, {size}{dropped}")
    if made.problem is not None:
        print(f"events are shown up to where they can be read: {plain(made.problem)}")
    _tell_picture(picture)


def _timeline_lines(made: Timeline, everything: bool) -> list[tuple[str, ...]]:
    """In the order in which it happened; of one moment by steps, and an attempt ends after all that it did."""
    found: list[tuple[tuple[str, int, int], tuple[str, ...]]] = []

    def add(order: int, moment: str, step: int | None, what: str, told: str = "", *, shown: str | None = None) -> None:
        key = (moment.rstrip("Z"), -1 if step is None else step, order)  # with Z the whole second came after its parts
        where = "–" if step is None else str(step)
        found.append((key, (moment_text(moment) if shown is None else shown, where, what, told)))

    for span in made.spans:
        told = [f"{span.rolled_back} steps done again"] * bool(span.rolled_back) + ["not exact"] * (not span.exact)
        add(0, span.started_at, span.begin, f"attempt {span.number} begins", ", ".join(told))
        if span.was_killed:
            heard = span.last_heard_at
            what, about = f"attempt {span.number} killed", "" if heard is None else "last heard of then"
            add(3, heard or span.started_at, span.end, what, about, shown="–" if heard is None else None)
        elif span.ended_at is not None:
            add(3, span.ended_at, span.end, f"attempt {span.number} {span.outcome}", span.error or "")
    for save in made.saves:
        if save.is_here:
            kinds = f" [{', '.join(save.kinds)}]" if save.kinds else ""
            add(1, save.saved_at, save.step, f"saved{kinds}", "; ".join(save.reasons))
        elif everything:
            add(1, save.saved_at, save.step, "saved, dropped", save.dropped_because or "")
    for incident in made.incidents:
        add(2, incident.time, incident.step, incident.text)
    return [line for _, line in sorted(found)]


def _tell_picture(picture: Path | None) -> None:
    if picture is not None:
        print(f"picture: {plain(str(picture))}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _text(value: Any) -> str:
    return "–" if value is None else _number(value) if isinstance(value, float) else setting_text(value)
