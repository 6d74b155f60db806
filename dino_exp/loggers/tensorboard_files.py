"""TensorBoard: event files in the run's directory, in which each row is there once, after any number of kills.

A row is one record of a file, so a writer that is killed leaves it whole or torn; a torn one counts as not written.
Each attempt writes a file of its own, since TensorBoard's readers stop at a torn record and go on with the next file.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dino_exp.errors import RefusedError
from dino_exp.fsio import make_dirs
from dino_exp.loggers.delivery import Row, deliver_command, numbers_of
from dino_exp.loggers.histograms import Weights, histogram_of

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger(__name__)

_PREFIX = "events.out.tfevents."
_MOST_WEIGHTS = 2  # copies of the model that wait to be written; older ones go first


class TensorBoardFiles:
    """Writes scalars, histograms of weights, what the HParams page compares runs by, and at the end a picture.

    `draw` gives the picture as PNG, from all rows; None where there is nothing to be seen yet.
    """

    name = "TensorBoard"

    def __init__(
        self,
        folder: Path,
        *,
        attempt: int,
        run_key: str,
        hparams: Mapping[str, bool | int | float | str],
        draw: Callable[[], bytes | None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.draw = draw
        self.folder, self.attempt, self.run_key, self.hparams, self.clock = folder, attempt, run_key, hparams, clock
        self.weights: deque[Weights] = deque(maxlen=_MOST_WEIGHTS)
        self._file: IO[bytes] | None = None
        self._records: RecordWriter | None = None
        self._last_step, self._last_histogram_step, self._last_picture_step = -1, -1, -1

    @property
    def remedy(self) -> str:
        """How the rest gets there."""
        command = deliver_command(self.folder.parent, "--tensorboard")
        return f"the next attempt with logger=tensorboard writes them, or `{command}`"

    def open(self) -> int | None:
        """The step of the newest row in the files. Raises OSError, RefusedError for a folder that leads elsewhere."""
        self._close_file()
        if self.folder.is_symlink():
            raise RefusedError(f"{self.folder} is a link; a run's files must lie inside it. Remove it")
        steps: dict[str, int] = {}
        for event in events_in(self.folder):
            for value in event.summary.value[:1]:  # all values of an event are of one kind
                kind = str(value.WhichOneof("value"))
                steps[kind] = max(event.step, steps.get(kind, -1))
        self._last_histogram_step = steps.get("histo", -1)
        self._last_picture_step = steps.get("image", -1)
        self._last_step = steps.get("simple_value", -1)
        return steps.get("simple_value")

    def deliver(self, rows: Sequence[Row]) -> None:
        """Write rows, and weights that wait. Raises OSError."""
        for row in rows:
            self._write(row["step"], scalars(numbers_of(row)))
            self._last_step = row["step"]
        self._write_histograms()
        self._flush()

    def close(self, secs: float, outcome: str) -> None:
        """Write what waits, a picture where there is time to draw it, and whether it is complete. Raises OSError."""
        self._write_histograms()
        if outcome in ("completed", "stopped") and self._last_step > self._last_picture_step:
            drawn = self.draw()
            if drawn is not None:
                self._write(self._last_step, picture(drawn))
        if outcome == "completed" and self._file is not None:
            self._write(0, end_of_session(self.clock()))
        self._flush()
        self._close_file()

    def abandon(self) -> None:
        """Nothing of it holds anything up."""

    def _write_histograms(self) -> None:
        while self.weights:
            weights = self.weights.popleft()
            if weights.step > self._last_histogram_step:
                self._write(weights.step, histograms(weights))
                self._last_histogram_step = weights.step

    def _write(self, step: int, summary: Summary) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._append(Event(wall_time=self.clock(), step=step, summary=summary))

    def _append(self, event: Event) -> None:
        if self._records is None:
            self._records = self._new_file()
        self._records.write(event.SerializeToString())

    def _new_file(self) -> RecordWriter:
        """A file after all others by name, as TensorBoard reads them in that order."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        make_dirs(self.folder)
        numbers = itertools.count(1)
        path = next(path for path in map(self._path, numbers) if not path.exists())
        self._file = path.open("xb")
        records = RecordWriter(self._file)
        records.write(Event(wall_time=self.clock(), file_version="brain.Event:2").SerializeToString())
        start = start_of_session(self.hparams, self.run_key, self.clock())
        records.write(Event(wall_time=self.clock(), step=0, summary=start).SerializeToString())
        return records

    def _path(self, number: int) -> Path:
        return self.folder / f"{_PREFIX}{self.attempt:05d}.{number:03d}"

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # after a failed write: what is missing is written to the next file
                self._file.close()
        self._file = self._records = None


def events_in(folder: Path) -> Iterator[Event]:
    """The events of a folder's files in their order; of each file up to its end or to a torn record."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in sorted(folder.glob(f"{_PREFIX}*")):
        yield from LegacyEventFileLoader(str(path)).Load()


def scalars(numbers: Mapping[str, float]) -> Summary:
    """Single precision, as TensorBoard has it."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()])


def histograms(weights: Weights) -> Summary:
    """A histogram for each tensor that has a finite element."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    made: list[Any] = []
    for name, values in weights.values.items():
        found = histogram_of(values)
        if found is not None:
            proto: HistogramProto = HistogramProto(**vars(found))
            made.append(Summary.Value(tag=f"weights/{name}", histo=proto))
    return Summary(value=made)


def picture(png: bytes) -> Summary:
    """A picture; a PNG says its width and height in bytes 16 to 23."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag="k-NN accuracy", image=image)])


def start_of_session(hparams: Mapping[str, bool | int | float | str], run_key: str, now_secs: float) -> Summary:
    """What the HParams page tells runs apart by."""
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    found: Summary = hparams_pb(dict(hparams), trial_id=run_key, start_time_secs=math.floor(now_secs))
    return found


def end_of_session(now_secs: float) -> Summary:
    """That the training is complete; without it the HParams page shows it as running."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    ended = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=now_secs)
    described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=ended))
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=described, tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])
