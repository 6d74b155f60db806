"""Where the images of a run lie now. A checkpoint does not say; the run's own settings do, or whoever asks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dino_exp import build
from dino_exp.config.image_sections import AnyDataConfig, FilesDataConfig, ReadyDataConfig
from dino_exp.config.stored import load_stored
from dino_exp.data.files.listing import Progress, unheard
from dino_exp.errors import DinoExpError, UsageError
from dino_exp.runs.layout import RunPaths


@dataclass(frozen=True, kw_only=True)
class Place:
    """`root`: what was said (None: as the run has it); `cache`: where caches lie (None: none is made)."""

    root: str | None = None
    cache: Path | None = None


AS_THE_RUN = Place()


def build_data_of(data: AnyDataConfig, paths: RunPaths, place: Place, progress: Progress = unheard) -> build.Data:
    """The data that a checkpoint of the run at `paths` records.

    Raises UsageError where its images are not found, and as `build_data` does.
    """
    if isinstance(data, ReadyDataConfig):
        if place.root is not None:
            raise UsageError(f"root={place.root}: the run is of data={data.name}, which has no files; leave it out")
        return build.build_data(data)
    root, cached = place.root, False
    try:
        stored = load_stored(paths.directory)
    except (DinoExpError, OSError) as problem:
        if root is None:
            raise UsageError(
                f"{paths.directory}: its settings cannot be read, so it is not known where its images lie ({problem}); "
                "say it: root=<folder>"
            ) from problem
    else:
        root = stored.data.root if root is None else str(Path(root).absolute())
        cached = isinstance(stored.data, FilesDataConfig) and stored.data.cache
    how = build.Preparation(
        cache=paths.directory.absolute().parent.parent / "cache" if place.cache is None else place.cache,
        progress=progress,
        root_key="root",
        looks_only=place.cache is None,
    )
    return build.build_data(replace(data, root=root, cache=cached), how)
