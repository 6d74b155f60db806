"""Two hosts on one machine: each has a network, a name, processes and names of hosts of its own; a cable joins them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


@dataclass(frozen=True)
class Host:
    """A name that the other host resolves, too."""

    name: str
    address: str
    names: Path  # what /etc/hosts is there
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def space(self) -> str:
        return f"{self.name}.{os.getpid()}"

    def start(self, command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Begin a command there. To kill its process is to kill all that it has started."""
        process = subprocess.Popen(
            [
                "ip", "netns", "exec", self.space,
                "unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child",
                "sh", "-c", ENTER, self.name, str(self.names), *command,
            ],
            cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.started.append(process)
        return process

    def switch_off(self) -> None:
        """Nothing of what was started is left."""
        for process in self.started:
            if process.returncode is None:
                process.kill()
                process.communicate()

    def pull_the_cable(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        _ip("-n", self.space, "link", "set", "eth0", "down")


def why_not() -> str | None:
    """Why there can be no hosts here."""
    missing = [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], check=False, capture_output=True
    )
    return f"needs namespaces: {tried.stderr.decode().strip()}" if tried.returncode else None


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    names = folder / "hosts"
    one, other = Host("host-a", "10.77.0.1", names), Host("host-b", "10.77.0.2", names)
    names.write_text(f"127.0.0.1 localhost\n{one.address} {one.name}\n{other.address} {other.name}\n")
    with contextlib.ExitStack() as stack:
        for host in (one, other):
            _ip("netns", "add", host.space)
            stack.callback(_ip, "netns", "delete", host.space)
            stack.callback(host.switch_off)
        _ip("link", "add", "eth0", "netns", one.space, "type", "veth", "peer", "eth0", "netns", other.space)
        for host in (one, other):
            _ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.space, "link", "set", "lo", "up")
            _ip("-n", host.space, "link", "set", "eth0", "up")
        yield one, other


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
