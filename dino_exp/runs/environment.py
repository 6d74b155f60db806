"""What the program ran on and with: `environment.json`. Tells differences apart when two runs disagree."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from dino_exp.runs.jsontext import Json
from dino_exp.runs.redact import MASK, is_secret_name, mask_arguments, strip_credentials

PACKAGES = (
    "dino-exp", "torch", "numpy", "scipy", "hydra-core", "omegaconf", "PyYAML", "matplotlib", "GitPython",
    "safetensors", "zstandard", "xxhash", "rich", "typer", "scikit-learn", "pillow", "tensorboard",
    "wandb", "submitit", "hydra-joblib-launcher", "hydra-submitit-launcher",
)  # fmt: skip
# Only what can change numbers, devices, ranks or where a run goes. Paths and the rest of the user's shell
# stay out.
_VARIABLE = re.compile(
    r"(?:DINO_EXP|CUDA|NVIDIA|NCCL|GLOO|CUBLAS|CUDNN|TORCH|TORCHELASTIC|PYTORCH|ATEN|OMP|KMP|MKL|OPENBLAS|NUMEXPR|SLURM"
    r"|SUBMITIT|HYDRA|WANDB)_[A-Z0-9_]+|PYTHONHASHSEED|PYTHONOPTIMIZE|PYTHONDEVMODE|(?:LOCAL_)?(?:RANK|WORLD_SIZE)"
    r"|MASTER_(?:ADDR|PORT)"
)


def environment_record(*, argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Json]:
    """The environment as JSON: python, platform, processor, memory, packages, torch build, variables,
    arguments.

    Secrets are masked and addresses lose their credentials. The working directory is left out, because a run
    must not depend on it. Imports nothing heavy: torch's build is told in full only when it is loaded
    already.
    """
    return {
        "format": 1,
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "host": socket.gethostname(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "usable_cores": _usable_cores()},
        "memory_bytes": _memory_bytes(),
        "packages": _package_versions(),
        "torch": _torch_build(),
        "variables": _variables(environ),
        "argv": list[Json](mask_arguments([Path(word).name for word in argv[:1]] + list(argv[1:]))),
    }


def _variables(environ: Mapping[str, str]) -> dict[str, Json]:
    chosen = sorted(name for name in environ if _VARIABLE.fullmatch(name))
    return {name: MASK if is_secret_name(name) else strip_credentials(environ[name]) for name in chosen}


def _package_versions() -> dict[str, Json]:
    versions: dict[str, Json] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _torch_build() -> dict[str, Json] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return {
        "version": str(torch.__version__),
        "git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
