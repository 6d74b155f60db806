"""Where the files of a run lie. Nothing else spells these names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The paths below one run directory. Looks at nothing and creates nothing."""

    directory: Path

    @property
    def run_json(self) -> Path:
        """The run's record, replaced atomically."""
        return self.directory / "run.json"

    @property
    def config_yaml(self) -> Path:
        """The resolved settings, for people."""
        return self.directory / "config.yaml"

    @property
    def canonical_json(self) -> Path:
        """Exactly the text that was hashed."""
        return self.directory / "config.canonical.json"

    @property
    def hydra_dir(self) -> Path:
        """What Hydra composed for the first attempt; never rewritten."""
        return self.directory / ".hydra"

    def attempt_hydra_dir(self, attempt: int) -> Path:
        """What Hydra composed for `attempt` (from 1): `.hydra` itself for the first."""
        return self.hydra_dir if attempt == 1 else self.hydra_dir / "attempts" / f"{attempt:03d}"

    @property
    def code_dir(self) -> Path:
        """Commit, patch and untracked files of the first attempt; `attempts/NNN` when one differs."""
        return self.directory / "code"

    @property
    def environment(self) -> Path:
        """Versions, machine and selected variables of the first attempt."""
        return self.directory / "environment.json"

    @property
    def events(self) -> Path:
        """Append-only: attempts, saves, drops, quarantines, signals, resumes."""
        return self.directory / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """One row a logging step."""
        return self.directory / "metrics.jsonl"

    def log(self, rank: int = 0) -> Path:
        """The text log of one rank."""
        return self.directory / ("train.log" if rank == 0 else f"train.rank{rank}.log")

    @property
    def failed(self) -> Path:
        """The traceback of the last attempt that failed."""
        return self.directory / "FAILED.txt"

    @property
    def lock(self) -> Path:
        """The file that the owner holds a POSIX lock on."""
        return self.directory / "lock"

    @property
    def owner(self) -> Path:
        """Who holds the lock."""
        return self.directory / "owner.json"

    @property
    def checkpoints(self) -> Path:
        """Manifests, packs and the registry."""
        return self.directory / "checkpoints"

    @property
    def needed_to_resume(self) -> tuple[Path, ...]:
        """What no training goes on without, beside a checkpoint."""
        return self.run_json, self.config_yaml, self.canonical_json, self.metrics

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard."""
        return self.directory / "tensorboard"

    @property
    def profile(self) -> Path:
        """Where the time of some steps went, an attempt each (`runtime.profile`)."""
        return self.directory / "profile"

    @property
    def report(self) -> Path:
        """The self-contained report of the run."""
        return self.directory / "report.html"
