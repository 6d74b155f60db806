"""A command that goes on from a run is composed beside that run's own kinds of data, augmentation and optimizer.

Hydra composes `fork=<run> optimizer.momentum=0.5` beside the default optimizer, which may have no momentum, and
refuses it before anybody has looked at the run. So the choices that such a command needs and does not make are made
for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dino_exp.config.compose import compose, touched_keys
from dino_exp.config.explain import group_choices
from dino_exp.config.stored import load_stored
from dino_exp.errors import DinoExpError
from dino_exp.runs.find import find_run, split_at

_KINDS = ("data", "augment", "optimizer")  # sections that have other settings with another name
_PRESET = re.compile(r"\+{0,2}(?:experiment|debug)=")
_NAMES_RUN = re.compile(r"\+{0,2}(?:resume|fork)=.")
_SAYS_WHERE = re.compile(r"\+{0,2}(?:resume|fork|paths\.outputs)=")


def with_own_choices(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The arguments with the choices that they need of the run that they name, and these choices by themselves.

    As they are where they name no run, or one that cannot be read: whoever looks for it next says why. A sweep's are
    left alone, since its jobs may go on from different runs.
    """
    named = next((at for at, word in enumerate(arguments) if _NAMES_RUN.match(word)), None)
    needed = [kind for kind in _KINDS if _sets_part(kind, arguments) and not _chooses(kind, arguments)]
    if named is None or not needed or {"--multirun", "-m"} & set(arguments):
        return list(arguments), ()
    try:
        by_preset = touched_keys([word for word in arguments if _PRESET.match(word)])
        composed = compose([word for word in arguments if _SAYS_WHERE.match(word)])
        run = find_run(Path(composed["paths"]["outputs"]), split_at(composed["resume"] or composed["fork"])[0])
        stored = load_stored(run)
    except (DinoExpError, OSError):
        return list(arguments), ()
    names = {kind: getattr(stored, kind).name for kind in needed if f"{kind}.name" not in by_preset}
    own = tuple(f"{kind}={name}" for kind, name in names.items() if name in group_choices()[kind])
    return [*arguments[:named], *own, *arguments[named:]], own


def _sets_part(kind: str, arguments: Sequence[str]) -> bool:
    return any(re.match(rf"[+~]{{0,2}}{kind}\.", word) for word in arguments)


def _chooses(kind: str, arguments: Sequence[str]) -> bool:
    return any(re.match(rf"[+~]{{0,2}}{kind}(?:@[^=]*)?=", word) for word in arguments)
