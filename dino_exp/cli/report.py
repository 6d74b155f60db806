"""`dino-exp checkpoints report`: a page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_exp.analysis.plan import ReportPlan
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunArgument, named_run
from dino_exp.cli.progress import progress
from dino_exp.cli.show import plain, print_json
from dino_exp.errors import UsageError
from dino_exp.fsio import make_dirs, write_atomic
from dino_exp.words import size_text

if TYPE_CHECKING:
    from dino_exp.analysis.page.document import Document

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
    from dino_exp.analysis.analyzer import CheckpointAnalyzer
    from dino_exp.analysis.run_report import chosen_steps, make_report

    analyzer = CheckpointAnalyzer(named_run(run, outputs, "a report").paths.directory)
    target = analyzer.paths.report if to is None else to
    check_target(target)
    plan = ReportPlan(most_checkpoints=most, most_bytes=most_mb * 10**6)
    with progress("reading", quiet=as_json) as bar:
        chosen = set(chosen_steps(analyzer, plan))
        bar.expect(sum(row["content_bytes"] for row in analyzer.listing.rows if row["step"] in chosen))
        document = make_report(analyzer, plan, look=None, progress=bar.heard)
    files = write_document(document, target)
    if as_json:
        print_json({"path": str(target), "files": list(map(str, files))})
        return
    size = size_text(sum(file.stat().st_size for file in files))
    print(f"{plain(str(target))}: {size}, {len(document.sections)} chapters; open it in a browser")


def check_target(path: Path) -> None:
    """Raises UsageError for a name that is none of a page."""
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"--to {path}: expected a name that ends in {' or '.join(_SUFFIXES)}")


def write_document(document: Document, path: Path) -> list[Path]:
    """Write a page, or Markdown with its pictures beside it, each file atomically; the files. Raises OSError."""
    if path.suffix == ".html":
        from dino_exp.analysis.page.html import to_html

        write_atomic(path, to_html(document), durable=False)
        return [path]
    from dino_exp.analysis.page.markdown import to_markdown

    folder = path.with_name(f"{path.stem}-pictures")
    make_dirs(folder)
    pictures = list(document.pictures())
    files = [folder / f"{picture.name}.svg" for picture in pictures]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    write_atomic(path, to_markdown(document, folder.name), durable=False)
    return [path, *files]
