"""Library generators of this process as JSON: python, numpy, torch on the CPU and on every CUDA device.

Training draws none of them; they are kept for code that does. They stay outside the digest of the state.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.types import JSON
from dino_exp.errors import CorruptCheckpointError


def capture_generators() -> JSON:
    """The states now."""
    version, words, gauss = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)
    # Asking a device that nobody uses would set it up: seconds, and memory on each GPU that others may be using.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {
        "python": {
            "version": version,
            "words": _text(np.asarray(words, "<u4").tobytes()),
            "gauss": _hex(gauss),
        },
        "numpy": {
            "key": _text(np.asarray(legacy["state"]["key"], "<u4").tobytes()),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": _hex(float(legacy["gauss"])),
        },
        "torch": _tensor_text(torch.get_rng_state()),
        "cuda": [_tensor_text(state) for state in cuda],
    }


def restore_generators(manifest: Manifest, rank: int = 0) -> bool:
    """Put back what a rank's process had; devices that are missing here, or were missing then, keep theirs.

    False when the checkpoint holds nothing for this rank. Raises CorruptCheckpointError when what it holds
    is not what `capture_generators` gave.
    """
    if rank >= len(manifest.generators) or manifest.generators[rank] is None:
        return False
    try:
        _restore(manifest.generators[rank])
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as problem:
        reason = str(problem)[:200]
        raise CorruptCheckpointError(f"step {manifest.step}: saved generators do not fit: {reason}") from problem
    return True


def _restore(saved: JSON) -> None:
    python, legacy = saved["python"], saved["numpy"]
    words = np.frombuffer(base64.b64decode(python["words"], validate=True), "<u4")
    random.setstate((python["version"], tuple(words.tolist()), _unhex(python["gauss"])))
    key = np.frombuffer(base64.b64decode(legacy["key"], validate=True), "<u4")
    gauss = _unhex(legacy["gauss"])
    if not 0 <= legacy["pos"] <= len(key):  # numpy does not look, and would read beyond the generator's words
        raise ValueError(f"numpy's position is {legacy['pos']} of {len(key)}")
    np.random.set_state(("MT19937", key, legacy["pos"], legacy["has_gauss"], 0.0 if gauss is None else gauss))
    torch.set_rng_state(_text_tensor(saved["torch"]))
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        for device, state in zip(devices, saved["cuda"], strict=False):  # as many as both have
            torch.cuda.set_rng_state(_text_tensor(state), device)


def _hex(value: float | None) -> str | None:
    return None if value is None else value.hex()


def _unhex(text: str | None) -> float | None:
    return None if text is None else float.fromhex(text)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tensor_text(state: torch.Tensor) -> str:
    return _text(state.numpy().tobytes())


def _text_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
