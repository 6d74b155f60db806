"""When the machine's time is over: a deadline that the settings give, or the end of a SLURM job."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping

from dino_exp.config.texts import read_moment

log = logging.getLogger(__name__)

SLURM_END = "SLURM_JOB_END_TIME"
_UNIX_SECS = re.compile(r"[0-9]{1,15}")


def deadline_secs(given: str | None, environ: Mapping[str, str], now_secs: float) -> float | None:
    """The end of the time for which the machine is there, in unix seconds; None where nobody knows.

    `given` (checkpoint.save.deadline) wins over SLURM's. An end that has passed by `now_secs` is no end of this
    attempt: a run keeps its first settings, and a shell the variables of a job that is over. Called once for each
    attempt, because it warns of what it leaves out. Raises ConfigError for a `given` that is no moment.
    """
    if given is not None:
        moment = read_moment(given)
        if moment > now_secs:
            return moment
        log.warning(
            "checkpoint.save.deadline=%s has passed and is ignored; give a later one, or checkpoint.save.deadline=null",
            given,
        )
    return _slurm_end(environ.get(SLURM_END, ""), now_secs)


def countdown(deadline: float | None, clock: Callable[[], float]) -> Callable[[], float | None]:
    """Tells the seconds to `deadline`, negative after it. `clock` reads unix seconds: it is set right now and then."""
    return lambda: None if deadline is None else deadline - clock()


def _slurm_end(text: str, now_secs: float) -> float | None:
    if not text:
        return None
    if not _UNIX_SECS.fullmatch(text):
        log.warning("%s=%.40r is ignored: expected unix seconds; checkpoint.save.deadline= can say it", SLURM_END, text)
        return None
    if int(text) <= now_secs:
        log.warning("%s=%s has passed and is ignored; checkpoint.save.deadline= can say another", SLURM_END, text)
        return None
    return float(text)
