"""`init.weights=`: a training that begins with the weights of a file.

The digest of the file's bytes becomes part of the run's identity (`init.weights_digest`); where it lies does not. The
state before the first step is the run's first checkpoint, so that no later attempt needs the file.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.config.canonical import config_hash
from dino_exp.config.image_sections import DataConfig
from dino_exp.config.schema import Config
from dino_exp.errors import ConfigError, DinoExpError, RefusedError, UsageError
from dino_exp.fsio import LOCAL
from dino_exp.runs.record import RunRecord, load_record
from dino_exp.weights.architecture import ARCHITECTURE
from dino_exp.weights.files import file_digest, read_weight_file
from dino_exp.weights.fitting import Fit, MisfitError, load_into

if TYPE_CHECKING:
    from dino_exp.training.state import TrainState
    from dino_exp.weights.architecture import Dimensions

PATH, DIGEST = "init.weights", "init.weights_digest"


def with_weights(config: Config) -> Config:
    """The settings with the digest of the file that `init.weights` names, read now.

    Raises ConfigError for a digest that was typed, UsageError where there is no such file, OSError.
    """
    if config.init.weights is None:
        return config
    if config.init.weights_digest is not None:
        raise ConfigError(f"{DIGEST} is found by reading the file: leave it out, {PATH}= is enough")
    return _with_digest(config, _digest(Path(config.init.weights)))


def with_weights_of_start(config: Config) -> Config:
    """The same for a command that may continue a run: where the file is gone, as it was when that run began with it.

    So a job that is started again by the same command goes on after its file was removed.
    """
    try:
        return with_weights(config)
    except UsageError:
        found = next(filter(None, map(functools.partial(_as_begun, config), _records(config))), None)
        if found is None:
            raise
        return found


def touched_with_digest(touched: Collection[str]) -> frozenset[str]:
    """The keys that a command sets: who names a file sets its digest."""
    return frozenset({*touched, DIGEST} if PATH in touched else touched)


def take_weights(config: Config, state: TrainState) -> dict[str, Any]:
    """Begin `state` with the weights of the file: student and teacher alike. What to record of it.

    Raises ConfigError (with what would fit) for weights of another model, RefusedError where the file is not the one
    that the run is named by, and as `read_weight_file` does.
    """
    assert config.init.weights is not None
    path = Path(config.init.weights).absolute()
    try:
        file = read_weight_file(path)
    except UsageError as gone:
        gone.add_note("the run has no checkpoint of its own yet, so it needs the file that it is to begin with")
        raise
    if file.digest != config.init.weights_digest:
        raise RefusedError(
            f"{path}: is not the file that this run is named by any more: found {file.digest}, expected "
            f"{config.init.weights_digest}. Put that one back, or start again with {PATH}= for another run"
        )
    try:
        _check_heads(config, file.metadata.get(ARCHITECTURE))
        fit = load_into(state.student, file)
    except MisfitError as misfit:
        hint = _what_fits(misfit.dimensions, config.data, _channels(state))
        raise ConfigError(f"{PATH}={path}: these weights are of another model: {misfit}{hint}") from misfit
    state.teacher.load_state_dict(state.student.state_dict())
    return report(path, file.digest, file.description, fit)


def report(path: Path, digest: str, description: str, fit: Fit) -> dict[str, Any]:
    """What `run.json` and `events.jsonl` say of the weights."""
    return {"path": str(path), "digest": digest, "source": description, **fit.as_json(), "text": fit.text}


def _with_digest(config: Config, digest: str) -> Config:
    """The path becomes absolute, so that a resume in another folder finds the file if it still needs it."""
    path = str(Path(str(config.init.weights)).absolute())
    return replace(config, init=replace(config.init, weights=path, weights_digest=digest))


def _digest(path: Path) -> str:
    """A command looks more than once, before and after it has the lock; the file is read again only if it changed."""
    try:
        status = path.stat()
    except OSError:
        return file_digest(path)  # which says what is wrong
    return _digest_of(path, (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _digest_of(path: Path, version: tuple[int, int, int]) -> str:
    return file_digest(path)


def _records(config: Config) -> list[RunRecord]:
    found = []
    for path in sorted((Path(config.paths.outputs) / "runs").glob("*/run.json")):
        try:
            record = load_record(path)
        except (DinoExpError, OSError):
            continue  # a damaged run beside this one is told where it is asked for
        found += [record] if record is not None and record.weights is not None else []
    return found


def _as_begun(config: Config, record: RunRecord) -> Config | None:
    """The settings, if `record` is of a run that began with these and with a file of this path."""
    weights: Any = record.weights
    if not isinstance(weights, dict) or weights.get("path") != str(Path(str(config.init.weights)).absolute()):
        return None
    try:
        same = _with_digest(config, str(weights.get("digest")))
    except ConfigError:  # no digest
        return None
    return same if config_hash(same) == record.config_hash else None


def _check_heads(config: Config, architecture: str | None) -> None:
    """Shapes do not tell how many heads there are; an export of ours says it. Raises MisfitError."""
    if architecture is None:
        return
    from dino_exp.fsio import parse_json

    said = parse_json(architecture.encode("utf-8", "replace"), "architecture", max_depth=4)
    found = said.get("num_heads") if isinstance(said, dict) else None
    if found is not None and found != config.model.num_heads:
        raise MisfitError(f"it has {str(found)[:20]} heads, model.num_heads is {config.model.num_heads}", None)


def _channels(state: TrainState) -> int:
    return int(state.student.state_dict()["backbone.patch_embed.proj.weight"].shape[1])


def _what_fits(found: Dimensions | None, data: DataConfig, channels: int) -> str:
    """The settings that the weights are made for, as they can be typed; empty where that is not known."""
    if found is None:
        return ""
    words = [*_model_words(found)]
    if found.patch_size != data.patch_size:
        words.append(f"data.patch_size={found.patch_size}")
    colours = f"; they need images of {found.in_channels} channels, data={data.name} has {channels}"
    return f". What fits: {' '.join(words)}{colours if found.in_channels != channels else ''}"


def _model_words(found: Dimensions) -> list[str]:
    """`model=vit_s`, or else its values one by one."""
    from dino_exp.config.explain import conf_directory
    from dino_exp.config.plain_yaml import parse_plain_yaml

    wanted = (found.embed_dim, found.depth, found.hidden_dim)
    for path in sorted((conf_directory() / "model").glob("*.yaml")):
        values = parse_plain_yaml(LOCAL.read_bytes(path), str(path))
        hidden_dim = int(values["embed_dim"] * values["mlp_ratio"])
        if (values["embed_dim"], values["depth"], hidden_dim) == wanted:
            return [f"model={path.stem}"]
    ratio = found.hidden_dim / found.embed_dim
    return [f"model.embed_dim={found.embed_dim}", f"model.depth={found.depth}", f"model.mlp_ratio={ratio:g}"]
