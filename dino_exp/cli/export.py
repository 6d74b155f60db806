"""`dino-exp checkpoints export`: the weights of a checkpoint, in a form that other programs read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunAtArgument, named
from dino_exp.cli.show import plain, print_json
from dino_exp.config.typed import override, train_command
from dino_exp.weights.exporting import Export, make_export
from dino_exp.weights.formats import Format
from dino_exp.weights.placing import check_target
from dino_exp.weights.source import CheckpointWeights, open_checkpoint
from dino_exp.words import count_text, size_text


class FormatChoice(StrEnum):
    """Who is to read it."""

    SAFETENSORS = "safetensors"
    HF = "hf"
    PTH = "pth"


class PartChoice(StrEnum):
    """Which of the two networks."""

    TEACHER = "teacher"
    STUDENT = "student"


def export(
    checkpoint: RunAtArgument,
    to: Annotated[Path, typer.Option("--to", metavar="PATH", help="The file to write; for hf a folder.")],
    form: Annotated[
        FormatChoice,
        typer.Option("--format", help="safetensors: official and timm names; hf: HuggingFace; pth: official DINO."),
    ] = FormatChoice.SAFETENSORS,
    part: Annotated[
        PartChoice | None, typer.Option("--part", help="By default the teacher; for pth both.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there already.")] = False,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Write the weights of a checkpoint (the latest) for other programs.

    safetensors is the backbone under the names of the official code and timm;
    hf a folder for transformers.ViTModel.from_pretrained; pth a checkpoint of
    the official code, heads and centre included, without pickled classes. All
    say which run, step, settings and commit made them. The run stays as it is,
    and may be in use. Nothing is overwritten without --force (exit 3).

    \b
    Examples:
      dino-exp checkpoints export last@best --to teacher.safetensors
      dino-exp checkpoints export last@best --format hf --to my-dino
      dino-exp checkpoints export vit_s-67b8@12000 --format pth --to full.pth
    """
    chosen: Format = form.value
    check_target(to, chosen, force=force)  # before hundreds of megabytes are read
    weights = open_checkpoint(named(checkpoint, outputs))
    made = make_export(weights, chosen, None if part is None else part.value)
    made.place(to, force=force)
    if as_json:
        print_json(_for_programs(made, to))
    else:
        _tell(made, weights, to)


def _for_programs(made: Export, to: Path) -> dict[str, Any]:
    return {
        "path": str(to),
        "format": made.form,
        "parts": list(made.parts),
        "tensors": made.num_tensors,
        "bytes": made.num_bytes,
        "architecture": made.architecture.as_json(),
        **made.facts,
    }


def _tell(made: Export, weights: CheckpointWeights, to: Path) -> None:
    what = f"{' and '.join(made.parts)} ({count_text(made.num_tensors, 'tensor')}, {size_text(made.num_bytes)})"
    print(plain(f"exported {what} of {weights.where} to {to}"))
    if made.form == "pth" and len(made.parts) == 1 and not weights.holds("student"):
        print("the student is not in it: the checkpoint was thinned to what evaluation needs")
    print(f"read it: {plain(_reader(made.form, to))}")


def _reader(form: Format, to: Path) -> str:
    """A line that opens the export."""
    match form:
        case "safetensors":
            return f"dino_exp.load_backbone({str(to)!r}), or {_train(to)}"
        case "hf":
            return f"transformers.ViTModel.from_pretrained({str(to)!r}, add_pooling_layer=False)"
        case "pth":
            return f"torch.load({str(to)!r}, weights_only=True), or {_train(to)}"


def _train(to: Path) -> str:
    return train_command(override("init.weights", to))
