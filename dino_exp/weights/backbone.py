"""`dino_exp.load_backbone`: a model for people who want features, without a configuration and without Hydra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dino_exp.config.typed import override, train_command
from dino_exp.errors import CorruptCheckpointError, UsageError
from dino_exp.fsio import parse_json
from dino_exp.runs.named import named
from dino_exp.weights.architecture import ARCHITECTURE, Architecture, build_backbone, check_shapes
from dino_exp.weights.files import WeightFile, read_weight_file
from dino_exp.weights.formats import SUFFIXES
from dino_exp.weights.names import PARTS, Part
from dino_exp.weights.source import BACKBONE, open_checkpoint

if TYPE_CHECKING:
    from dino_exp.models.vit import VisionTransformer


def load_backbone(wanted: str | Path, *, part: Part = "teacher", outputs: str | Path = "outputs") -> VisionTransformer:
    """See `dino_exp.load_backbone`."""
    if part not in PARTS:
        raise UsageError(f"part={part!r}: expected teacher or student")
    if str(wanted).endswith(".safetensors"):
        return _from_file(Path(wanted), part)
    if str(wanted).endswith(SUFFIXES["pth"]) and not Path(wanted).is_dir():
        raise UsageError(
            f"{wanted}: expected a run or a .safetensors file of `dino-exp checkpoints export`, which names its "
            f"model; to begin a training with this file: {train_command(override('init.weights', wanted))}"
        )
    weights = open_checkpoint(named(str(wanted), Path(outputs)))
    architecture = weights.architecture(part)
    return build_backbone(architecture, weights.tensors(f"{part}.{BACKBONE}"), weights.where)


def _from_file(path: Path, part: Part) -> VisionTransformer:
    file = read_weight_file(path, part)
    said, tensors = recorded_architecture(file), file.model.backbone
    check_shapes(said, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, str(path))
    return build_backbone(said, tensors, str(path))


def recorded_architecture(file: WeightFile) -> Architecture:
    """What an exported file says of its model.

    Raises UsageError for a file that was not exported here, CorruptCheckpointError for one that was changed.
    """
    text = file.metadata.get(ARCHITECTURE)
    if text is None:
        raise UsageError(
            f"{file.path}: does not say which model it is of, as exports do (dino-exp checkpoints export); to begin a "
            "training with it: python -m dino_exp.train init.weights=<file>"
        )
    values = parse_json(text.encode("utf-8", "replace"), str(file.path), max_depth=4, error=CorruptCheckpointError)
    try:
        return Architecture(**values)
    except (TypeError, ValueError) as problem:
        raise CorruptCheckpointError(f"{file.path}: no architecture ({str(problem)[:80]})") from problem
