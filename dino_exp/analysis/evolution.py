"""How a run's weights have moved from checkpoint to checkpoint: read one tensor at a time.

What is measured of a checkpoint is folded into blocks (`backbone.blocks.3`, `head.last_layer`) and into one total.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from dino_exp.analysis.measures import (
    Spectrum,
    Sums,
    change_sum,
    dead_rows,
    on_one_core,
    plain_sum,
    spectrum_of,
    square_sum,
)
from dino_exp.analysis.names import block_of, is_statistic, place_in_network
from dino_exp.checkpoint.arrays import Array, OpenCheckpoint
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.store import Store
from dino_exp.errors import DinoExpError

STUDENT, TEACHER, OPTIMIZER = "student.", "teacher.", "optimizer."
PROTOTYPES = "head.last_layer.weight_v"
TOTAL = "total"
_FIRST, _SECOND = (".exp_avg", ".momentum_buffer", ".mu"), ".exp_avg_sq"
_BEFORE = "before."
_MOMENTS = (*_FIRST, _SECOND)
_KEPT_BYTES = 64 << 20  # of a student that is kept for the next checkpoint instead of being read again

Progress = Callable[[int], None]  # hears of bytes of tensors, as they are read


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Of one block, or of all of them; None where the checkpoint, or the one before it, does not hold what it needs.

    Norms are Euclidean. `change` is that of the student since the checkpoint before; `relative_change` the same over
    the student's norm then. `distance` and `cosine` are between student and teacher. The moments are Adam's:
    `second_moment` is the root of its sum, so of the size of a gradient; the momentum of SGD and
    LARS is a `first_moment`.
    """

    student_norm: float | None = None
    teacher_norm: float | None = None
    change: float | None = None
    relative_change: float | None = None
    distance: float | None = None
    cosine: float | None = None
    first_moment: float | None = None
    second_moment: float | None = None


MEASURES = tuple(Measures.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One checkpoint. `problem` says what of it could not be read; then the rest may be empty.

    `epoch` counts those that were complete, `epochs` the part of one as well; None where the manifest cannot be read.
    """

    step: int
    epoch: int | None = None
    epochs: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    total: Measures = field(default_factory=Measures)
    blocks: Mapping[str, Measures] = field(default_factory=dict)
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    dead_prototypes: int | None = None
    num_prototypes: int | None = None
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            **asdict(self),
            "spectra": {name: one._asdict() for name, one in self.spectra.items()},
        }


def walk(
    store: Store, steps: Iterable[int], weights: Sequence[str] | None = None, progress: Progress = lambda _: None
) -> Iterator[Moment]:
    """The checkpoints of these steps, in this order, each compared with the one before it that could be read.

    `weights`: those whose spectra are taken, without their part; None: a few of each model (`chosen_weights`). What
    a training drops meanwhile is left out; what is damaged is told in its `problem`. Raises OSError.
    """
    before: _Before | None = None
    for step in steps:
        found = _look_at(store, step, before, weights, progress)
        if found is None:
            continue
        moment, kept = found
        before = kept or before
        yield moment


def _look_at(
    store: Store, step: int, before: _Before | None, weights: Sequence[str] | None, progress: Progress
) -> tuple[Moment, _Before | None] | None:
    """A checkpoint, and its student for the next one; None where a training has dropped it meanwhile."""
    identity = store.identity(step)
    opened: OpenCheckpoint | None = None
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(on_one_core())
            opened = stack.enter_context(OpenCheckpoint(store, step))
            look = _Look(opened, None if before is None else stack.enter_context(before), weights, progress)
            moment = look.measure()
        return moment, _Before(store, step, look) if look.holds_student else None
    except FileNotFoundError:
        return None
    except DinoExpError as damage:
        if step not in store.steps():
            return None
        if identity not in (None, store.identity(step)):  # the same state was written anew meanwhile, in other packs
            return _look_at(store, step, before, weights, progress)
        damaged = Moment(step=step) if opened is None else _described(opened.manifest)
        return replace(damaged, problem=str(damage)), None


def _described(manifest: Manifest) -> Moment:
    """What the manifest says, before anything is measured."""
    return Moment(
        step=manifest.step,
        epoch=manifest.epoch,
        epochs=round(manifest.step / manifest.schedule.steps_per_epoch, 6),
        metrics=dict(manifest.metrics),
    )


def parameters_of(names: Iterable[str]) -> list[str]:
    """What student and teacher learn, without its part: `backbone.norm.weight`; batch-norm statistics are left out."""
    bare = (name.partition(".")[2] for name in names if name.startswith((STUDENT, TEACHER)))
    return list(dict.fromkeys(name for name in bare if not is_statistic(name)))


def chosen_weights(names: Sequence[str]) -> tuple[str, ...]:
    """Weights that tell much: queries, keys and values of the first, middle and last block, and the prototypes."""
    qkv = sorted((name for name in names if name.endswith(".attn.qkv.weight")), key=place_in_network)
    places = dict.fromkeys((0, len(qkv) // 2, len(qkv) - 1)) if qkv else ()
    return (*(qkv[place] for place in places), *(name for name in names if name == PROTOTYPES))


class _Before:
    """The student of the checkpoint before: kept, or read again where it is large."""

    def __init__(self, store: Store, step: int, look: _Look) -> None:
        self._store, self._step, self._kept = store, step, look.kept
        self.squares: Mapping[str, float] = look.squares
        self._opened: OpenCheckpoint | None = None

    def __enter__(self) -> _Before:
        if self._kept is None:
            with contextlib.suppress(FileNotFoundError, DinoExpError):  # dropped meanwhile: nothing to compare with
                self._opened = OpenCheckpoint(self._store, self._step)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._opened is not None:
            self._opened.__exit__(*failure)
            self._opened = None

    def load(self, name: str) -> Array | None:
        if self._kept is not None:
            return self._kept.get(name)
        if self._opened is None or STUDENT + name not in self._opened.manifest.tensors:
            return None
        try:
            return self._opened.load(STUDENT + name)
        except (FileNotFoundError, DinoExpError):
            return None


class _Look:
    """Goes through one checkpoint, and adds up by block and in total.

    At most three tensors are held at a time: two to be compared, and the next one, which is read beside.
    """

    def __init__(
        self, opened: OpenCheckpoint, before: _Before | None, weights: Sequence[str] | None, progress: Progress
    ) -> None:
        self._opened, self._before, self._progress = opened, before, progress
        tensors = opened.manifest.tensors
        self._names = parameters_of(tensors)
        self._chosen = chosen_weights(self._names) if weights is None else weights
        self.holds_student = any(name.startswith(STUDENT) for name in tensors)
        student_bytes = sum(entry.num_bytes for name, entry in tensors.items() if name.startswith(STUDENT))
        self.kept: dict[str, Array] | None = {} if self.holds_student and student_bytes <= _KEPT_BYTES else None
        self.squares: dict[str, float] = {}  # of the student's tensors, by name
        self._squares: dict[str, dict[str, float]] = {}
        self._spectra: dict[str, Spectrum] = {}
        self._dead: int | None = None
        self._ahead: _Ahead

    def measure(self) -> Moment:
        """All of it."""
        self._opened.expect_all()
        with ThreadPoolExecutor(1) as reading:
            self._ahead = _Ahead(reading, self._wanted())
            for name in self._names:
                block = block_of(STUDENT + name)
                self._models(block, name)
                self._moments(block, name)
        manifest = self._opened.manifest
        measured = {group: _measures(squares) for group, squares in self._squares.items()}
        table = manifest.tensors.get(STUDENT + PROTOTYPES) or manifest.tensors.get(TEACHER + PROTOTYPES)
        return replace(
            _described(manifest),
            total=measured.pop(TOTAL, Measures()),
            blocks=measured,
            spectra=self._spectra,
            dead_prototypes=self._dead,
            num_prototypes=None if table is None else table.shape[0],
        )

    def _wanted(self) -> Iterator[tuple[str, Callable[[], Array | None]]]:
        """What will be loaded, in order, under which name."""
        for name in self._names:
            for part in (STUDENT + name, TEACHER + name, *(OPTIMIZER + name + ending for ending in _MOMENTS)):
                if part in self._opened.manifest.tensors:
                    yield part, partial(self._opened.load, part)
                if part == STUDENT + name and self._before is not None:
                    yield _BEFORE + name, partial(self._before.load, name)

    def _models(self, block: str, name: str) -> None:
        student = self._load(STUDENT + name)
        if student is None and self._before is not None:
            self._ahead.take(_BEFORE + name)
        if student is not None:
            self.squares[name] = square_sum(student)
            self._add(block, student=self.squares[name])
            self._change(block, name, student)
            if self.kept is not None:
                self.kept[name] = student
        teacher = self._load(TEACHER + name)
        if teacher is not None:
            self._add(block, teacher=square_sum(teacher))
        if student is not None and teacher is not None and student.shape == teacher.shape:
            self._add(block, distance=change_sum(student, teacher))
        weight = student if student is not None else teacher
        if name in self._chosen and weight is not None and (spectrum := spectrum_of(weight)) is not None:
            self._spectra[name] = spectrum

    def _change(self, block: str, name: str, student: Array) -> None:
        before = None if self._before is None else self._ahead.take(_BEFORE + name)
        if self._before is not None and before is not None and before.shape == student.shape:
            self._add(block, before=self._before.squares[name], change=change_sum(before, student))

    def _moments(self, block: str, name: str) -> None:
        for ending in _FIRST:
            first = self._load(OPTIMIZER + name + ending)
            if first is not None:
                self._add(block, first=square_sum(first))
        second = self._load(OPTIMIZER + name + _SECOND)
        if second is not None:
            self._add(block, second=plain_sum(second))
            if name == PROTOTYPES:
                self._dead = dead_rows(second)

    def _load(self, name: str) -> Array | None:
        entry = self._opened.manifest.tensors.get(name)
        if entry is None:
            return None
        self._progress(entry.num_bytes)
        return self._ahead.take(name)

    def _add(self, block: str, **squares: float) -> None:
        for group in (block, TOTAL):
            into = self._squares.setdefault(group, {})
            for name, value in squares.items():
                into[name] = into.get(name, 0.0) + value


class _Ahead:
    """Reads the tensor after the one that is being looked at. `wanted`: names, and what loads each."""

    def __init__(self, reading: Executor, wanted: Iterator[tuple[str, Callable[[], Array | None]]]) -> None:
        self._reading, self._wanted = reading, wanted
        self._next: tuple[str, Future[Array | None]] | None = None
        self._begin()

    def take(self, name: str) -> Array | None:
        """The next one, which has this name. Raises as `OpenCheckpoint.load`."""
        assert self._next is not None
        expected, future = self._next
        assert expected == name
        found = future.result()
        self._begin()
        return found

    def _begin(self) -> None:
        wanted = next(self._wanted, None)
        self._next = None if wanted is None else (wanted[0], self._reading.submit(wanted[1]))


def _measures(squares: Mapping[str, float]) -> Measures:
    def root(name: str) -> float | None:
        return math.sqrt(squares[name]) if name in squares else None

    a, b, apart = (squares.get(name, 0.0) for name in ("student", "teacher", "distance"))
    between = Sums(a, b, product=(a + b - apart) / 2)
    since = Sums(a=squares.get("before", 0.0), difference=squares.get("change", 0.0))
    return Measures(
        student_norm=root("student"),
        teacher_norm=root("teacher"),
        change=root("change"),
        relative_change=since.relative,
        distance=root("distance"),
        cosine=between.cosine if "distance" in squares else None,
        first_moment=root("first"),
        second_moment=root("second"),
    )
