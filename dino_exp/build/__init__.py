"""From settings to objects: the only package that sees the whole configuration and makes things of it.

A `name` in the configuration selects one of the entries of a table here; nothing is imported by a name that a file
or a command line gives.
"""

from dino_exp.build.checkpoints import build_keep_policy, build_manager, build_member, build_save_policy
from dino_exp.build.images import (
    Data,
    build_augment,
    build_batches,
    build_data,
    build_prefetch,
    cache_to_make,
    decoding,
)
from dino_exp.build.learning import (
    build_dimensions,
    build_evaluator,
    build_modules,
    build_plan,
    build_rule,
    build_schedules,
    build_state,
    build_student,
    parallel_name,
    peak_lr,
    prepare_layers,
    read_every,
    spread,
)
from dino_exp.build.preparation import Preparation

__all__ = [
    "Data",
    "Preparation",
    "build_augment",
    "build_batches",
    "build_data",
    "build_dimensions",
    "build_evaluator",
    "build_keep_policy",
    "build_manager",
    "build_member",
    "build_modules",
    "build_plan",
    "build_prefetch",
    "build_rule",
    "build_save_policy",
    "build_schedules",
    "build_state",
    "build_student",
    "cache_to_make",
    "decoding",
    "parallel_name",
    "peak_lr",
    "prepare_layers",
    "read_every",
    "spread",
]
