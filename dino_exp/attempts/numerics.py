"""What may change the last bits of a training: device, threads, determinism, versions; also of what decodes its images.

The values of a run's first attempt are recorded in `run.json`; each later attempt is compared with them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dino_exp.allocator import keep_freed_memory
from dino_exp.config.evaluate import MachineConfig
from dino_exp.config.schema import RuntimeConfig
from dino_exp.config.typed import setting_text
from dino_exp.dist.place import ALONE, Place
from dino_exp.errors import ConfigError

MAX_THREADS = 16  # chosen unasked: more do not help models of the sizes that fit a CPU
SWITCHES = ("compile", "tf32", "gradient_checkpointing")  # recorded where they are on
MAX_RECORDED_THREADS = 1024  # as many as the setting allows


def choose_device(asked: str, place: Place = ALONE) -> torch.device:
    """The device to train on; of several processes on a host each has its own.

    Raises ConfigError where cuda is asked for and torch sees none, or fewer devices than processes: on each of them, or
    those that have a device would wait for the others.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ConfigError(f"runtime.device=cuda: torch {torch.__version__} sees no CUDA device; use runtime.device=cpu")
    if asked == "cpu" or not available:
        return torch.device("cpu")
    if place.size == 1:
        return torch.device("cuda")
    num_devices = torch.cuda.device_count()
    if num_devices == 1 and len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
        return torch.device("cuda", 0)  # the launcher shows each process its own (submitit, srun --gpus-per-task=1)
    if place.local_size > num_devices:
        raise ConfigError(
            f"rank {place.rank} is one of {place.local_size} processes on this host, which has {num_devices} CUDA "
            f"devices; start as many processes as devices: torchrun --nproc-per-node {num_devices}"
        )
    return torch.device("cuda", place.local_rank)


def choose_threads(asked: int | None, recorded: Any, place: Place = ALONE) -> int:
    """Threads of torch: what is asked for, else what the first attempt had, else the cores of this machine.

    Several processes on a host share its cores. `recorded` is None where they were not as many.
    """
    if asked is not None:
        return asked
    if type(recorded) is int and 1 <= recorded <= MAX_RECORDED_THREADS:
        return recorded
    # Also for a record of nonsense, which is then told as a difference.
    return max(min(len(os.sched_getaffinity(0)) // place.local_size, MAX_THREADS), 1)


def apply_numerics(
    runtime: RuntimeConfig | MachineConfig, recorded: Mapping[str, Any], place: Place = ALONE
) -> tuple[torch.device, dict[str, Any]]:
    """Set up torch and the memory of this process, and describe the setting for `run.json`."""
    keep_freed_memory()
    device = choose_device(runtime.device, place)
    same_size = recorded.get("world_size", 1) == place.size
    threads = choose_threads(runtime.threads, recorded.get("threads") if same_size else None, place)
    torch.set_num_threads(threads)
    # The same switch as use_deterministic_algorithms, which also imports the compiler (1.3 s that nothing here needs).
    torch.set_deterministic_debug_mode("error" if runtime.deterministic else "default")
    # Deterministic mode also fills fresh memory, to show reads of it; nothing here reads any, and filling costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if runtime.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.backends.cudnn.benchmark = False
    switched_on = {name: True for name in SWITCHES if getattr(runtime, name, False)}
    torch.backends.cuda.matmul.fp32_precision = "tf32" if "tf32" in switched_on else "ieee"
    return device, switched_on | {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": threads,
        "deterministic": runtime.deterministic,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "world_size": place.size,
    }


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why bits may differ from here on, one sentence a value; empty when nothing changed."""
    switches = dict.fromkeys(SWITCHES, False)
    was, now = switches | dict(recorded), switches | dict(now)
    changed = [name for name, value in now.items() if was.get(name) != value]
    found = [
        f"{name} was {setting_text(was.get(name, 'not recorded'))}, is {setting_text(now[name])}" for name in changed
    ]
    return [
        f"{text} (every step still sees the same images)" if text.startswith("world_size") else text for text in found
    ]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (a device file, not a path of ours)
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
