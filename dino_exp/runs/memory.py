"""How much memory this machine still has for a process."""

from __future__ import annotations

from pathlib import Path

_MEMINFO, _CGROUP, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP, cgroups: Path = _CGROUPS) -> int | None:
    """What the system, and the control groups that the process is in, still have; None where nobody says so."""
    found = [*_of_system(meminfo), *_of_groups(cgroup, cgroups)]
    return min(found) if found else None


def _of_system(meminfo: Path) -> list[int]:
    lines = [line.split() for line in _text(meminfo).splitlines() if line.startswith("MemAvailable:")]
    return [int(words[1]) * 1024 for words in lines if len(words) > 1 and words[1].isdecimal()]


def _of_groups(cgroup: Path, cgroups: Path) -> list[int]:
    """Of version 2: each group above the process may have a limit. Cache that can be given up is not in use."""
    names = [line.partition("::")[2] for line in _text(cgroup).splitlines() if line.startswith("0::")]
    found = []
    for name in names:
        folder = cgroups / name.strip("/")
        for group in (folder, *folder.parents):
            limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
            if limit.isdecimal() and used.isdecimal():
                found.append(max(int(limit) - int(used) + _cache(group), 0))
            if group == cgroups:
                break
    return found


def _cache(group: Path) -> int:
    lines = [line.split() for line in _text(group / "memory.stat").splitlines() if line.startswith("inactive_file ")]
    return sum(int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal())


def _text(path: Path) -> str:
    """Empty where there is no such file: another system, another version."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
