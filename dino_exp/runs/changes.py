"""What a later attempt of a run was told to do otherwise than its first: `.hydra/attempts/NNN/diff.json`."""

from __future__ import annotations

from typing import Any

from dino_exp.fsio import DamagedFileError, read_json_bounded
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.shape import WrongShapeError, anything, list_of, map_of, text


def changed_settings(paths: RunPaths, attempt: int) -> dict[str, Any]:
    """Its settings that are not the run's own, by dotted key; none where none are recorded. Raises DamagedFileError."""
    path = paths.attempt_hydra_dir(attempt) / "diff.json"
    try:
        rows = list_of(map_of(anything))(read_json_bounded(path, max_depth=16))
        return {text(row.get("key")): row.get("now") for row in rows}
    except FileNotFoundError:
        return {}
    except WrongShapeError as error:
        raise DamagedFileError(f"{path}: {error}") from error
