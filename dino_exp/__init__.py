"""dino_exp: train DINO with exact resumption, durable checkpoints and versioned runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dino_exp.models.vit import VisionTransformer
    from dino_exp.weights.names import Part

__version__ = "0.1.0"


def load_backbone(wanted: str | Path, *, part: Part = "teacher", outputs: str | Path = "outputs") -> VisionTransformer:
    """The teacher's vision transformer of a checkpoint, in evaluation mode, on the CPU.

    `wanted` is a run directory, the beginning of a run key or `last` (below `outputs`), with `@best`, `@latest` or
    `@<step>` behind it (else the latest); a manifest's path; or a `.safetensors` file of `dino-exp checkpoints export`.
    The model takes images (B, C, H, W), normalised as in training, to features (B, D); `forward_tokens` gives all
    tokens. Reads only: nothing is changed, run or unpickled, and every byte is checked against its digest.

    Raises UsageError where nothing is called so, NoCheckpointError where the run has no such checkpoint or the
    checkpoint not this part (one that was thinned has no student), CorruptCheckpointError for damage.
    """
    from dino_exp.weights import backbone  # torch: only for those who ask

    return backbone.load_backbone(wanted, part=part, outputs=outputs)
