"""`data.root=`: a training on images that lie in files.

The digest of their listing becomes part of the run's identity (`data.digest`); where they lie does not. A resume keeps
the digest of its run: whether the images are still the same is told by their fingerprint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dino_exp.config.check import config_from_mapping
from dino_exp.config.compare import as_mapping
from dino_exp.config.image_sections import AnyDataConfig, CifarDataConfig, FilesDataConfig, ReadyDataConfig
from dino_exp.config.schema import Config
from dino_exp.errors import ConfigError

ROOT, CACHE, DOWNLOAD = "data.root", "data.cache", "data.download"
DIGEST, CHOICE = "data.digest", "data.name"
OF_FILES = {
    ROOT: None,
    CACHE: False,
    DOWNLOAD: False,
}  # what says nothing about the images themselves, and its values without files


def with_files(config: Config) -> Config:
    """The settings with the digest of the images below `data.root`, looked through now; CIFAR needs none.

    Raises ConfigError for a digest that was typed, UsageError where there are no images, DataError, OSError.
    """
    data = config.data
    if isinstance(data, CifarDataConfig):
        return replace(config, data=replace(data, root=_absolute(str(data.root))))
    if not isinstance(data, FilesDataConfig):
        return config
    if data.digest is not None:
        raise ConfigError(f"{DIGEST} is found by looking through the folder: leave it out, {ROOT}= is enough")
    return _looked_through(config, data)


def with_files_of_fork(config: Config, touched: Collection[str]) -> Config:
    """The same for a run whose settings are its parent's but for the `touched` ones: which may name other images."""
    data = config.data
    if not isinstance(data, FilesDataConfig) or not {ROOT, CHOICE, DIGEST} & set(touched):
        return config
    return with_files(config if DIGEST in touched else replace(config, data=replace(data, digest=None)))


def apart_from_files(composed: Mapping[str, Any], touched: Collection[str]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """A command that goes on from a run, without its `data.root` and `data.cache`, and those of them that it says.

    Hydra composes such a command beside the default data set, which has no files; the run's own is known later.
    """
    data, goes_on = composed["data"], composed["resume"] is not None or composed["fork"] is not None
    said = [key for key in OF_FILES if key in touched]
    if not goes_on or not said or CHOICE in touched or not isinstance(data, Mapping):
        return composed, {}
    plain = {key.partition(".")[2]: value for key, value in OF_FILES.items()}
    return {**composed, "data": {**data, **plain}}, {key: data.get(key.partition(".")[2]) for key in said}


def with_files_at(config: Config, said: Mapping[str, Any]) -> Config:
    """The settings of a run with what a command says of its files. Raises ConfigError where its data has none."""
    if not said:
        return config
    if isinstance(config.data, ReadyDataConfig):
        told = ", ".join(f"{key}={value}" for key, value in said.items())
        raise ConfigError(f"{told}: the data of this run is data={config.data.name}, which has no files")
    values = {key.partition(".")[2]: value for key, value in said.items()}
    if values.get("root") is not None:
        values["root"] = _absolute(str(values["root"]))
    mapping = as_mapping(config)
    return config_from_mapping({**mapping, "data": {**mapping["data"], **values}})


def check_data(data: AnyDataConfig) -> None:
    """Refuse a training whose data is not where its settings say, before it leaves a mark. Raises ConfigError.

    Images in files were looked through where their digest was asked for; a resume may find them all in its cache.
    """
    if isinstance(data, CifarDataConfig) and data.root is not None:
        # Imported here: numpy is not needed for other data.
        from dino_exp.data.cifar import COLLECTIONS, check_place

        check_place(COLLECTIONS[data.name], Path(data.root), fetches=data.download)


def _looked_through(config: Config, data: FilesDataConfig) -> Config:
    # Imported here: numpy is not needed for other data, nor a bar.
    from dino_exp.data.files.listing import current_listing
    from dino_exp.loggers.bar import WorkBar

    root = _absolute(str(data.root))
    with WorkBar() as bar:
        digest = current_listing(root, bar.tell).digest
    return replace(config, data=replace(data, root=root, digest=digest))


def _absolute(root: str) -> str:
    """So that a resume in another folder finds the images."""
    return str(Path(root).expanduser().absolute())
