"""Element types by the names that manifests use, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """Bytes of one element, and the type's code in a safetensors header."""

    item_bytes: int
    code: str


DTYPES = {
    "float64": DType(8, "F64"),
    "float32": DType(4, "F32"),
    "float16": DType(2, "F16"),
    "bfloat16": DType(2, "BF16"),
    "float8_e4m3fn": DType(1, "F8_E4M3"),
    "float8_e5m2": DType(1, "F8_E5M2"),
    "int64": DType(8, "I64"),
    "int32": DType(4, "I32"),
    "int16": DType(2, "I16"),
    "int8": DType(1, "I8"),
    "uint64": DType(8, "U64"),
    "uint32": DType(4, "U32"),
    "uint16": DType(2, "U16"),
    "uint8": DType(1, "U8"),
    "bool": DType(1, "BOOL"),
}
