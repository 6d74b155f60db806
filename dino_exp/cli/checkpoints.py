"""`dino-exp checkpoints list|show|verify`: look after one run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.cli.show import console, metric_text, print_json, print_table, size_text, table
from dino_exp.runs.find import find_run, split_at
from dino_exp.runs.layout import RunPaths

app = typer.Typer(no_args_is_help=True, help="List, show and verify the checkpoints of a run.")

RunArgument = Annotated[
    str,
    typer.Argument(
        help="A run directory, the beginning of a run key, or `last`; `@latest`, `@best` or `@<step>` may follow."
    ),
]
OutputsOption = Annotated[Path, typer.Option("--outputs", help="Where runs lie.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
OUTPUTS = Path("outputs")


def open_run(run: str, outputs: Path) -> tuple[CheckpointReader, str | None]:
    """The reader of the run that `run` names, and what is named behind `@`."""
    name, at = split_at(run)
    return CheckpointReader(RunPaths(find_run(outputs, name)).checkpoints), at


@app.command("list")
def list_checkpoints(run: RunArgument, outputs: OutputsOption = OUTPUTS, as_json: JsonOption = False) -> None:
    """List the checkpoints of a run, oldest first."""
    reader, at = open_run(run, outputs)
    rows = [row for row in reader.rows() if at is None or row["step"] == reader.resolve(at)]
    if as_json:
        print_json(rows)
        return
    if not rows:
        print(
            "no checkpoint can be read; `dino-exp checkpoints verify` says why"
            if reader.num_found()
            else "no checkpoints yet"
        )
        return
    columns = ("step", "epoch", "kinds", "knn_top1", "loss", "size", "created", "verified", "state")
    print_table(columns, [_line(row) for row in rows], right=("step", "epoch", "knn_top1", "loss", "size"))


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["step"]),
        str(row["epoch"]),
        " ".join(row["kinds"]),
        metric_text(row["metrics"], "knn_top1"),
        metric_text(row["metrics"], "loss"),
        size_text(row["bytes"]),
        row["created_at"],
        "yes" if row["verified"] else "no",
        (row["state_digest"] or "")[:11],
    )


@app.command()
def show(run: RunArgument, outputs: OutputsOption = OUTPUTS, as_json: JsonOption = False) -> None:
    """Show one checkpoint: where it comes from, its metrics and its tensors."""
    reader, at = open_run(run, outputs)
    found = reader.show(at or "latest")
    if as_json:
        print_json(found)
        return
    out = console()
    facts = {name: value for name, value in found.items() if name not in ("tensors", "metrics")}
    out.print(table(("", ""), [(name, _text(value)) for name, value in facts.items()]))
    out.print(
        table(
            ("metric", "value"),
            [(name, metric_text(found["metrics"], name)) for name in found["metrics"]],
            right=("value",),
        )
    )
    tensors = [
        (t["name"], t["dtype"], "×".join(map(str, t["shape"])) or "scalar", size_text(t["bytes"]))
        for t in found["tensors"]
    ]
    out.print(table(("tensor", "dtype", "shape", "size"), tensors, right=("size",)))


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@app.command()
def verify(run: RunArgument, outputs: OutputsOption = OUTPUTS, as_json: JsonOption = False) -> None:
    """Read every byte of every checkpoint (or of the one behind `@`) and compare digests; exit 4 on damage."""
    reader, at = open_run(run, outputs)
    steps = None if at is None else [reader.resolve(at)]
    with Progress(
        TextColumn("verifying"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        transient=True,
        disable=as_json,
    ) as bar:
        task = bar.add_task("verify", total=None)
        found = reader.verify(steps, progress=lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        print_json(found)
    else:
        _print_verdict(run, found)
    if not found["ok"]:
        raise typer.Exit(4)


def _print_verdict(run: str, found: dict[str, Any]) -> None:
    if found["ok"]:
        print(f"all good: {found['checked']} checkpoints of {run} checked, every byte")
        return
    print(f"{len(found['damaged'])} damaged places in {found['checked']} checkpoints of {run}:")
    for place in found["damaged"]:
        print(f"  step {place['step']}  {place['tensor'] or '–'}  {place['pack'] or '–'}: {place['reason']}")
    print("a resume moves a damaged checkpoint to quarantine/ and goes on from the next older one")
