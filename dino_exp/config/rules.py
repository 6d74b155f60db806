"""Combinations of settings that cannot work; each message names the keys and says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dino_exp.config.image_sections import AnyDataConfig, CifarDataConfig, FilesDataConfig, ReadyDataConfig
from dino_exp.config.texts import read_best, read_moment
from dino_exp.errors import ConfigError

if TYPE_CHECKING:
    from dino_exp.config.schema import Config

DIGITS_TRAINING_IMAGES = 1437  # the fixed split of scikit-learn's 1,797 digits
MAX_WIDTH = 10**6  # of a hidden layer
CIFAR_TRAINING_IMAGES = 50_000  # of CIFAR-10 and of CIFAR-100


def rule_problems(config: Config) -> list[str]:
    """Everything that is impossible in a configuration whose single values are all valid."""
    rules = (
        _model_rules,
        _data_rules,
        _augment_rules,
        _batch_rules,
        _schedule_rules,
        _origin_rules,
        _start_and_stop_rules,
        _deadline_rules,
        _best_rules,
    )
    return [problem for rule in rules for problem in rule(config)]


def asked_problems(config: Config) -> list[str]:
    """What is impossible in a command by itself, whatever run it goes on from."""
    return list(_origin_rules(config))


def _model_rules(config: Config) -> Iterator[str]:
    model = config.model
    if model.embed_dim % model.num_heads:
        yield (
            f"model.num_heads={model.num_heads} does not divide model.embed_dim={model.embed_dim}: "
            "choose a divisor, so that every head has the same width"
        )
    hidden = model.embed_dim * model.mlp_ratio
    if not 1 <= hidden <= MAX_WIDTH:
        yield (
            f"model.mlp_ratio={model.mlp_ratio:g} with model.embed_dim={model.embed_dim} makes hidden layers of "
            f"{hidden:g} units: choose one that makes them 1 to {MAX_WIDTH:,} wide (usual: 4)"
        )


def _data_rules(config: Config) -> Iterator[str]:
    data = config.data
    for key, size in (("image_size", data.image_size), ("local_size", data.local_size)):
        if size % data.patch_size:
            yield (
                f"data.{key}={size} is not a multiple of data.patch_size={data.patch_size}: "
                "crops are cut into whole patches"
            )
    if data.local_size > data.image_size:
        yield f"data.local_size={data.local_size} is larger than data.image_size={data.image_size}"
    yield from _files_rules(config)
    if not isinstance(data, ReadyDataConfig):
        return
    made = data.name == "synthetic"
    for key, value in (("num_samples", data.num_samples), ("num_classes", data.num_classes)):
        if made and value is None:
            yield f"data.{key} is null: data=synthetic needs a whole number"
        if not made and value is not None:
            yield f"data.{key}={value} applies to data=synthetic only: set data.{key}=null"


def _files_rules(config: Config) -> Iterator[str]:
    data, name = config.data, config.data.name
    if data.download and not isinstance(data, CifarDataConfig):
        yield f"data.download=true and data={name}, which is not fetched (cifar10 and cifar100 are): leave it out"
    if isinstance(data, ReadyDataConfig) and data.root is not None:
        yield f"data.root={data.root} and data={name}, which has no files: use data=folder, or leave it out"
    if data.cache and not isinstance(data, FilesDataConfig):
        yield f"data.cache=true and data={name}, which needs no decoding: leave it out"
    if data.root is None and not isinstance(data, ReadyDataConfig):
        yield f"data={name} needs the folder of its images: add data.root=<folder>"
    if not isinstance(data, FilesDataConfig):
        return
    if name == "imagenet" and data.labels != "folders":
        yield f"data.labels={data.labels} with data=imagenet, whose folders are its classes: use data=folder for that"


def _augment_rules(config: Config) -> Iterator[str]:
    if config.augment.name == "digits" and not isinstance(config.data, ReadyDataConfig):
        yield f"augment=digits is made for grey digits and data={config.data.name} is in colour: use augment=dino"
    if config.augment.name == "dino" and config.data.name == "digits":
        yield "augment=dino needs colour images and data=digits is grey: use augment=digits or data=synthetic"


def _batch_rules(config: Config) -> Iterator[str]:
    batch = config.train.batch_size
    num_images = _num_training_images(config.data)
    if num_images is not None and batch > num_images:
        yield (
            f"train.batch_size={batch} is more than the {num_images} training images "
            f"of data={config.data.name}: an epoch would have no step"
        )
    if config.loss.use_bn and batch < 2:
        yield "train.batch_size=1 with loss.use_bn=true: batch norm needs at least 2 images"
    if config.train.accumulate > batch:
        yield f"train.accumulate={config.train.accumulate} is more than train.batch_size={batch}: a part would be empty"
    if config.loss.use_bn and config.train.accumulate > 1:
        yield (
            f"train.accumulate={config.train.accumulate} with loss.use_bn=true: batch norm needs the whole batch at "
            "once. Use train.accumulate=1, more processes, or loss.use_bn=false"
        )


def _num_training_images(data: AnyDataConfig) -> int | None:
    """How many there are, where the settings tell."""
    if isinstance(data, ReadyDataConfig):
        return DIGITS_TRAINING_IMAGES if data.name == "digits" else data.num_samples
    # Of images in files it is known when they are listed.
    return CIFAR_TRAINING_IMAGES if isinstance(data, CifarDataConfig) else None


def _schedule_rules(config: Config) -> Iterator[str]:
    warmups = {
        "scheduler.warmup_epochs": config.scheduler.warmup_epochs,
        "loss.warmup_teacher_temp_epochs": config.loss.warmup_teacher_temp_epochs,
    }
    for key, epochs in warmups.items():
        if epochs > config.train.epochs:
            yield (
                f"{key}={epochs} is longer than train.epochs={config.train.epochs}: shorten the warm-up, such as "
                f"{key}={config.train.epochs // 2}"
            )


def _origin_rules(config: Config) -> Iterator[str]:
    if config.resume is not None and config.fork is not None:
        yield "resume and fork are both set: resume continues a run, fork starts a new one from it"
    if config.fork is not None and config.init.weights is not None:
        yield "fork and init.weights are both set: a fork begins with its parent's state; leave one of them out"


def _start_and_stop_rules(config: Config) -> Iterator[str]:
    train = config.train
    if train.stop_after_steps is not None and train.stop_after_epochs is not None:
        yield "train.stop_after_steps and train.stop_after_epochs are both set: set one of them to null"
    if config.init.weights_digest is not None and config.init.weights is None:
        yield "init.weights_digest is set by init.weights=<file>: give the file"


def _deadline_rules(config: Config) -> Iterator[str]:
    save = config.checkpoint.save
    if save.deadline is None:
        return
    try:
        read_moment(save.deadline)
    except ConfigError as problem:
        yield f"checkpoint.save.deadline: {problem}"
    if save.before_secs is None:
        yield (
            "checkpoint.save.deadline is set and checkpoint.save.before_secs is null, so nothing would be saved before "
            "it: set checkpoint.save.before_secs=120, or checkpoint.save.deadline=null"
        )


def _best_rules(config: Config) -> Iterator[str]:
    seen: dict[tuple[str, str], str] = {}
    for text in config.checkpoint.keep.also_best:
        try:
            metric, mode, _ = read_best(text)
        except ConfigError as problem:
            yield f"checkpoint.keep.also_best: {problem}"
            continue
        if (metric, mode) in seen:  # also bounds the number of rules that a manifest records
            yield f"checkpoint.keep.also_best: {seen[metric, mode]!r} and {text!r} rank alike: keep one of them"
        seen[metric, mode] = text
