"""Hydra composes here; what leaves is plain dicts and lists. No other module of the library starts Hydra.

Hydra 1.3 answers a wrong setting with exit code 1, and one job's SystemExit ends a whole sweep. Here a wrong
setting is a ConfigError with exit code 2, and a job's error is that job's.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dino_exp.config.check import known_keys
from dino_exp.config.compare import roles_by_key
from dino_exp.config.evaluate import EvaluateConfig
from dino_exp.config.explain import HYDRA_ERRORS, conf_directory, explain
from dino_exp.config.fields import Section, walk_mapping
from dino_exp.config.multirun import AnnounceSweep, Sweep
from dino_exp.config.schema import Config
from dino_exp.config.typed import failure_text
from dino_exp.errors import STOPPING, CompositionError, ConfigError, DinoExpError, of_os

PRESETS = ("experiment", "debug")  # groups whose choices set keys of many sections
_REFERENCE = re.compile(r"\$\{\s*([^${}:\s]*)\s*(?=(.?))", re.DOTALL)  # what it names, and what follows that


@dataclass(frozen=True)
class Program:
    """One that Hydra starts: its primary configuration in `conf/`, and the schema of its settings."""

    primary: str
    schema: type[Section]


TRAIN = Program("config", Config)
EVALUATE = Program("evaluate", EvaluateConfig)


class JobEnd(NamedTuple):
    """How a job ended: its exit code, and what a sweeper optimises, None where nothing was measured."""

    code: int
    value: float | None = None


Task = Callable[[dict[str, Any], Sequence[str]], JobEnd]
"""Runs one job: its resolved settings (not yet checked), its overrides as typed -> how it ended."""


class LauncherLeavesError(BaseException):
    """A launcher's own signal handler wants this process to end with a code of its own (submitit requeues so)."""

    def __init__(self, leaving: SystemExit) -> None:
        super().__init__(leaving.code)
        self.leaving = leaving


class SweepWatcher(Protocol):
    """Hears of a sweep in the process that the user started."""

    def starts(self, sweep: Sweep) -> int | None:
        """Before the first job. An exit code ends the sweep there; a DinoExpError does too."""

    def ends(self, codes: Sequence[int]) -> int:
        """After the last job, also of a sweep that was stopped; the exit code. `codes` of jobs of this process."""


def hydra_main(task: Task, make_watcher: Callable[[], SweepWatcher] | None = None, program: Program = TRAIN) -> int:
    """Run the command line of `program` in `sys.argv`: call `task` once for each job, and return an exit code.

    A DinoExpError, of the composition or of a job, is told on stderr and gives its own exit code; in a sweep
    the next job runs, and the watcher, made when there is a sweep, says how all of it ended. Any other exception of a
    task is our bug and is raised. Nothing is written to the working directory (Hydra's record of a sweep goes to
    `outputs/sweeps`).
    """
    jobs = _Jobs(task, program.schema)
    main = hydra.main(
        config_path=str(conf_directory()), config_name=program.primary, **version_arguments(), **_allowed_to_import()
    )
    watching: list[SweepWatcher] = []  # not in `jobs`, which launchers pickle
    bugs: list[Exception] = []

    def start_watching(find_sweep: Callable[[], Sweep]) -> None:
        assert make_watcher is not None
        watcher = make_watcher()
        try:
            _announce(find_sweep, watcher)
        except Exception as bug:
            bugs.append(bug)
            raise SystemExit(1) from bug  # of anything else Hydra warns, and runs the jobs without a plan
        watching.append(watcher)

    token = _to_announce.set(start_watching)
    try:
        with _errors_raised():
            code = _exit_code(lambda: jobs.run_all(main(jobs.run)), program.schema)
    finally:
        _to_announce.reset(token)
    if bugs:
        raise bugs[0]
    if watching:
        ended = _exit_code(lambda: watching[0].ends(jobs.codes), program.schema)
        return code or ended
    return next((code for code in (*jobs.codes, code) if code), 0)


_to_announce: ContextVar[Callable[[Callable[[], Sweep]], None]] = ContextVar("to_announce")


def announce(find_sweep: Callable[[], Sweep]) -> None:
    """Called by Hydra's callback, which cannot be given an object. `find_sweep` may raise what a job may."""
    _to_announce.get()(find_sweep)


class _Jobs:
    """Keeps the outcomes: Hydra drops what a job returns, and tells what it raises in words of its own."""

    def __init__(self, task: Task, schema: type[Section]) -> None:
        self.task, self.schema = task, schema
        self.num_started = 0
        self.codes: list[int] = []

    def run(self, composed: DictConfig) -> float:
        """One job, as Hydra calls it; what a sweeper optimises, NaN for a job that failed or measured nothing."""
        self.num_started += 1
        if not STOPPING.isdisjoint(self.codes):
            return math.nan  # a signal stopped an earlier job: it was meant for the sweep
        overrides, values = list(HydraConfig.get().overrides.task), list[float]()

        def run_task() -> int:
            end = self.task(plain_settings(composed, self.schema), overrides)
            values.extend([] if end.value is None or end.code else [end.value])
            return end.code

        try:
            self.codes.append(_exit_code(run_task, self.schema))
        except LauncherLeavesError as launcher:
            raise launcher.leaving from None
        return values[0] if values else math.nan

    def run_all(self, main: Callable[[], None]) -> int:
        """What Hydra makes of the command line."""
        try:
            main()
        except ValueError as error:
            if self.num_started:
                raise
            # Options of Hydra that exclude each other, or a group that was given what is no name.
            raise ConfigError(explain(error, self.schema, sys.argv[1:])) from error
        return 0


def _announce(find_sweep: Callable[[], Sweep], watcher: SweepWatcher) -> None:
    """Tell the watcher. Hydra only warns of what a callback raises, unless it is a SystemExit."""
    codes: list[int] = []

    def tell() -> int:
        found = watcher.starts(find_sweep())
        codes.extend([] if found is None else [found])
        return 0

    error = _exit_code(tell)
    if error or codes:
        raise SystemExit(error or codes[0])


def _exit_code(call: Callable[[], int], schema: type[Section] = Config) -> int:
    """What `call` returns, or the exit code of the error that it raises, told on stderr."""
    try:
        return call()
    except HYDRA_ERRORS as error:
        failure: DinoExpError = ConfigError(explain(error, schema))
    except DinoExpError as error:
        failure = error
    except BrokenPipeError:
        return closed_pipe()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT
    except OSError as error:
        failure = of_os(error)
    except SystemExit as error:
        return _system_exit_code(error)
    sys.stderr.write(f"{failure_text(failure)}\n")
    return failure.exit_code


def closed_pipe() -> int:
    """The exit code of a program whose reader went away (`| head`), which is nobody's mistake."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
    return 128 + signal.SIGPIPE


def _system_exit_code(error: SystemExit) -> int:
    """What the interpreter makes of it: nothing is 0, a message is told and is 1."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    sys.stderr.write(f"{error.code}\n")
    return 1


@contextlib.contextmanager
def _errors_raised() -> Iterator[None]:
    """Have Hydra raise its errors, by its documented switch; otherwise it prints them and exits with 1."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _allowed_to_import() -> dict[str, Any]:
    """What a configuration may name for Hydra to import, for versions that ask (1.4 on): our own callback, no more.

    Hydra's launchers and sweepers are allowed by being its plugins.
    """
    asks = "execution_whitelist" in inspect.signature(hydra.main).parameters
    return {"execution_whitelist": [f"{AnnounceSweep.__module__}.{AnnounceSweep.__name__}"]} if asks else {}


def version_arguments() -> dict[str, str]:
    """`version_base` for Hydra 1.3, which warns without it; nothing for later ones, which warn about it."""
    return {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}


def compose(overrides: Sequence[str] = (), program: Program = TRAIN) -> dict[str, Any]:
    """The resolved settings for a list of command-line overrides, as nested plain values, not yet checked.

    Raises CompositionError, and ConfigError for settings that cannot be resolved. Inside a Hydra job it uses that job's
    search path but for what its `hydra.searchpath` adds, and the job is not disturbed.
    """
    try:
        with _initialised():
            composed = hydra.compose(config_name=program.primary, overrides=list(overrides))
    except (*HYDRA_ERRORS, ValueError) as error:  # ValueError: a group override by null or by a dictionary
        raise CompositionError(explain(error, program.schema, overrides)) from error
    try:
        return plain_settings(composed, program.schema)
    except HYDRA_ERRORS as error:
        raise ConfigError(explain(error, program.schema, overrides)) from error


def plain_settings(composed: DictConfig, schema: type[Section] = Config) -> dict[str, Any]:
    """Resolved plain values of a composed configuration; a missing value stays `???`.

    Raises ConfigError for an identity setting that would come out otherwise elsewhere: one that interpolates
    the clock, the environment or anything but other settings. OmegaConfBaseException for a broken reference.
    """
    raw = OmegaConf.to_container(composed, resolve=False)
    leaves = dict(walk_mapping(raw))
    roles = roles_by_key(schema)
    impure = [key for key, value in leaves.items() if roles.get(key) == "identity" and _is_impure(key, value, leaves)]
    if impure:
        lines = [f"{key}: {leaves[key]!r} depends on the machine or the clock" for key in impure]
        raise ConfigError("configuration: " + "\n  ".join(lines) + "\nGive the value itself")
    resolved = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def touched_keys(overrides: Sequence[str], beside: Sequence[str] = ()) -> frozenset[str]:
    """The dotted keys that a list of overrides sets, when it is composed with those in `beside`, which touch nothing.

    A value override sets its key (or all keys below it), a group override all keys of its section (`logger=` only those
    that its choices switch); an experiment or debug choice sets what its file states, and whatever comes out
    differently because of it. Raises ConfigError.
    """
    touched: set[str] = set()
    for override, line in _parse(overrides):
        key = override.key_or_group
        if override.is_hydra_override():
            continue
        if key in PRESETS:
            touched |= _preset_keys(key, override.value(), line, [*beside, *overrides])
        else:
            touched |= _group_keys(key) if key == "logger" else _keys_of(key)
    return frozenset(touched)


def _keys_of(key: str) -> set[str]:
    return {name for name in known_keys() if name == key or name.startswith(f"{key}.")}


def _group_keys(group: str) -> set[str]:
    """What some choice of a group states, where the choices are parts that add up, and none of them is a whole."""
    files = (conf_directory() / group).glob("*.yaml")
    stated = [OmegaConf.to_container(OmegaConf.load(file), resolve=False) for file in files]
    return {f"{group}.{key}" for mapping in stated for key, _ in walk_mapping(mapping)} & _keys_of(group)


@contextlib.contextmanager
def _initialised() -> Iterator[None]:
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with hydra.initialize_config_dir(str(conf_directory()), job_name="dino_exp", **version_arguments()):
        yield


def _parse(overrides: Sequence[str]) -> Iterator[tuple[Any, str]]:
    try:
        yield from zip(OverridesParser.create().parse_overrides(list(overrides)), overrides, strict=True)
    except HYDRA_ERRORS as error:
        raise ConfigError(explain(error)) from error


def _preset_keys(group: str, choice: Any, line: str, overrides: Sequence[str]) -> set[str]:
    with_it = dict(walk_mapping(compose(overrides)))
    without = dict(walk_mapping(compose([other for other in overrides if other != line])))
    keys = {key for key in {**with_it, **without} if with_it.get(key) != without.get(key)}
    file = conf_directory() / group / f"{choice}.yaml"
    stated = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
    return keys | {key for key, _ in walk_mapping(stated) if key in known_keys()}


def _is_impure(key: str, value: Any, leaves: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether a raw value calls a resolver (`${now:...}`), itself, inside of others, or through what it refers to."""
    if isinstance(value, list):
        return any(_is_impure(key, item, leaves, depth) for item in value)
    if not isinstance(value, str) or "${" not in value:
        return False
    found = _REFERENCE.findall(value)
    if depth > 8 or any(end == ":" or name.startswith("hydra") for name, end in found):
        return True
    named = [one for name, end in found for one in _named(_absolute(name, key), leaves, begins=end != "}")]
    return any(_is_impure(one, leaves[one], leaves, depth + 1) for one in named if one != key)


def _absolute(name: str, key: str) -> str:
    """The dotted key that a reference in the value of `key` names: `.lr` is beside it, `betas[0]` is `betas.0`."""
    plain = name.lstrip(".")
    num_dots = len(name) - len(plain)
    around = key.split(".")[:-num_dots] if num_dots else []
    return ".".join([*around, plain.replace("[", ".").replace("]", "")])


def _named(name: str, leaves: Mapping[str, Any], *, begins: bool) -> list[str]:
    """The leaves that a reference may take its value from: itself, what is in it, or the list that it is in.

    `begins`: only the beginning is known (`${optimizer.${run.note}}`).
    """
    return [
        leaf
        for leaf in leaves
        if f"{leaf}.".startswith(f"{name}.") or f"{name}.".startswith(f"{leaf}.") or (begins and leaf.startswith(name))
    ]
