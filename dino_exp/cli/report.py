"""`dino-exp checkpoints report`: a page about a run."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_exp.analysis.plan import ReportPlan
from dino_exp.analysis.style import check_suffix
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunArgument, named_run
from dino_exp.cli.progress import progress
from dino_exp.cli.show import plain, print_json
from dino_exp.fsio import make_dirs, write_shared
from dino_exp.words import size_text

if TYPE_CHECKING:
    from dino_exp.analysis.analyzer import CheckpointAnalyzer
    from dino_exp.analysis.page.document import Block, Document
    from dino_exp.examination.sight import Sight

ToOption = Annotated[
    Path | None,
    typer.Option("--to", metavar="FILE", help="Where to: .html, or .md with its pictures in a folder beside it."),
]
_SUFFIXES = (".html", ".md")


def report(
    run: RunArgument,
    to: ToOption = None,
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Whether to load the model, for attention maps.")
    ] = True,
    most: Annotated[
        int, typer.Option("--most", min=0, metavar="N", help="Measure the weights of at most N checkpoints.")
    ] = ReportPlan.most_checkpoints,
    most_mb: Annotated[
        int, typer.Option("--most-mb", min=0, metavar="MB", help="Read at most so many megabytes of weights.")
    ] = ReportPlan.most_bytes // 10**6,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Write a page about a run: report.html in its directory, to be opened in any browser, without network.

    Summary, health, timeline, weights, storage, attention maps, settings,
    identity, and how to go on. A training writes it at its evaluations, and an
    open page then shows the newer one by itself. The run may be in use.

    \b
    Examples:
      dino-exp checkpoints report last
      dino-exp checkpoints report last --to notes/run.md
      dino-exp checkpoints report vit_s-67b8 --most 200 --to vit_s.html
    """
    wanted = named_run(run, outputs, "a report")
    target = wanted.paths.report if to is None else to
    check_target(target)
    plan = ReportPlan(most_checkpoints=most, most_bytes=most_mb * 10**6)
    with contextlib.ExitStack() as stack:
        look = None
        if model and wanted.reader.num_found():
            from dino_exp.examination.sight import looking

            look = partial(_looked, wait=stack.enter_context(looking(wanted.paths.directory)))
        from dino_exp.analysis.analyzer import CheckpointAnalyzer  # after that other process has begun with torch
        from dino_exp.analysis.run_report import chosen_steps, make_report

        analyzer = CheckpointAnalyzer(wanted.paths.directory)
        bar = stack.enter_context(progress("reading", quiet=as_json))
        chosen = set(chosen_steps(analyzer, plan))
        bar.expect(sum(row["content_bytes"] for row in analyzer.listing.rows if row["step"] in chosen))
        document = make_report(analyzer, plan, look=look, progress=bar.heard)
    files = write_document(document, target)
    if as_json:
        print_json({"path": str(target), "files": list(map(str, files))})
        return
    size = size_text(sum(file.stat().st_size for file in files))
    print(f"{plain(str(target))}: {size}, {len(document.sections)} chapters; open it in a browser")


def _looked(run: CheckpointAnalyzer, *, wait: Callable[[], Sight]) -> list[Block]:
    """Attention maps and patch colours."""
    from dino_exp.analysis.figures.attention import draw_attention, draw_patch_colours
    from dino_exp.analysis.page.document import Command, Figure

    sight = wait()
    explained = " + ".join(f"{share:.0%}" for share in sight.explained)
    whose = f"The teacher of step {sight.step:,} ({sight.at})"
    evaluate = f"python -m dino_exp.evaluate of={shlex.quote(f'{run.directory}@{sight.at}')}"
    return [
        Figure(
            draw_attention(sight.images, sight.attention),
            f"{whose} on held-out images: where its class token looks in the last block, each head for itself.",
        ),
        Figure(
            draw_patch_colours(sight.images, sight.colours),
            f"{whose}: patches whose features are alike have like colours. The three colours are the first principal "
            f"components, which explain {explained} of the variance.",
        ),
        Command(f"{evaluate} evaluation=attention evaluation.images=16", "More images"),
        Command(f"{evaluate} evaluation=linear", "How well a linear layer tells the classes apart"),
    ]


def check_target(path: Path) -> None:
    """Raises UsageError for a name that is none of a page, or in a place where no file can be written."""
    check_suffix(path, "--to", _SUFFIXES)


def write_document(document: Document, path: Path) -> list[Path]:
    """Write a page, or Markdown with its pictures beside it, each file atomically; the files. Raises OSError."""
    make_dirs(path.absolute().parent)
    if path.suffix == ".html":
        from dino_exp.analysis.page.html import to_html

        write_shared(path, to_html(document), durable=False)
        return [path]
    from dino_exp.analysis.page.markdown import to_markdown

    folder = path.with_name(f"{path.stem}-pictures")
    make_dirs(folder)
    pictures = list(document.pictures())
    files = [folder / f"{picture.name}.svg" for picture in pictures]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    write_shared(path, to_markdown(document, folder.name), durable=False)
    return [path, *files]
