"""Whether numbers are finite, judged from their bytes, without torch and without a copy of them."""

from __future__ import annotations

import numpy as np

from dino_exp.checkpoint.pack import BLOCK_BYTES

_NATIVE = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}
_BFLOAT16_EXPONENT = np.uint16(0x7F80)


def is_finite(content: memoryview, dtype: str) -> bool:
    """False when a floating-point element of these bytes is NaN or infinite; other element types always are finite.

    Eight-bit floats are not looked at: they hold what was scaled for them.
    """
    return all(_block_is_finite(content[at : at + BLOCK_BYTES], dtype) for at in range(0, len(content), BLOCK_BYTES))


def _block_is_finite(block: memoryview, dtype: str) -> bool:
    if dtype == "bfloat16":
        return not bool(((np.frombuffer(block, "<u2") & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any())
    if dtype not in _NATIVE:
        return True
    return bool(np.isfinite(np.frombuffer(block, _NATIVE[dtype])).all())
