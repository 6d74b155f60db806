"""What a failing disk or a stranger may have put into a file of a run, and the one property that every reader keeps.

`changed_json` is a stranger who knows the format (and seals what he wrote, so that the digest fits); `torn` is a disk.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dino_exp.errors import DinoExpError

T = TypeVar("T")
MAX_MESSAGE = 4000  # characters: one message, not a copy of the file
READ, REFUSED = "read", "refused"
BOUNDED = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

NASTY_NUMBERS = (
    -1, 0, 1, 7, 63, 64, 255, 10**6, 2**31, 2**32, 10**9, 10**12, 2**49, 2**50, 2**53 + 1, 2**62, 2**63, 2**64,
    10**30, 10**310, 10**4000, -(2**63), 0.0, -0.0, 0.5, 24.0, 1e-320, 1e308, -1e300,
)  # fmt: skip
NASTY_TEXTS = (
    "", "../../etc/passwd", "/etc/passwd", "..", ".", "packs/../../x", "~/x", "step-000000002.json\n", "a\x00b",
    "\ud800", "\x1b[2J\x1b]0;x\x07", "\N{RIGHT-TO-LEFT OVERRIDE}gpj", "[/red]", "[bold]", "[link=file:///etc]x", "%s%n",
    "${oc.env:HOME}", "${seed}", "!!python/object/apply:os.system", "os.system", "__import__('os')", "__class__",
    "__metadata__", "_target_", "{0.__class__}", "nan", "inf", "-inf", "NaN", "1e999", "null", "true",
    "\N{ARABIC-INDIC DIGIT THREE}", "9" * 5000, "x" * 2000, "raw/1", "zstd/1", "delta/1", "float32", "float64",
    "student.weight", "latest", "best",
)  # fmt: skip
# What `json.dumps` cannot write: put into the text in the place of a value.
RAW_JSON = (
    "NaN", "-Infinity", "1e999", "-1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 90 + "1" + "}" * 90,
    '{"a":1,"a":2}', "01", "tru", "", "0x10", "'a'", '"\x01"', "-0", "1E2", "\ufeff1", "//", "[1,]", '"\\ud800"',
)  # fmt: skip
_RAW_MARK = "@raw json@"


def _deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


_leaves = (
    st.none() | st.booleans() | st.sampled_from(NASTY_NUMBERS) | st.sampled_from(NASTY_TEXTS) | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
)  # fmt: skip
junk = (
    _leaves
    | st.lists(_leaves, max_size=4)
    | st.dictionaries(st.sampled_from(NASTY_TEXTS) | st.text(max_size=5), _leaves, max_size=3)
    | st.sampled_from([_deep(levels) for levels in (2, 20, 60, 94, 120)])
)


def _places(value: Any) -> list[Any]:
    return sorted(value) if isinstance(value, dict) else list(range(len(value)))


def _descend(draw: Callable[..., Any], value: Any) -> tuple[Any, Any]:
    """A container inside `value` and a key of it; every level is as likely as the next."""
    key = draw(st.sampled_from(_places(value)))
    while isinstance(value[key], dict | list) and value[key] and draw(st.booleans() | st.just(True)):
        value = value[key]
        key = draw(st.sampled_from(_places(value)))
    return value, key


@st.composite
def changed_json(draw: Callable[..., Any], original: Any) -> Any:
    """A copy of nested JSON with a few changes that keep it JSON."""
    root = [copy.deepcopy(original)]
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        if not isinstance(root[0], dict | list) or not root[0]:
            break
        _change(draw, root)
    return root[0]


def _change(draw: Callable[..., Any], root: list[Any]) -> None:
    part, key = _descend(draw, root[0])
    match draw(st.sampled_from(("junk", "junk", "delete", "double", "rename", "swap", "nudge"))):
        case "junk":
            part[key] = copy.deepcopy(draw(junk))  # what is sampled is shared, and a later change may go into it
        case "delete":
            del part[key]
        case "double" if isinstance(part, list):
            part.append(copy.deepcopy(part[key]))
        case "double" | "rename" if isinstance(part, dict):
            part[draw(st.sampled_from(NASTY_TEXTS) | st.sampled_from(_places(part)))] = copy.deepcopy(part[key])
        case "swap":
            other, other_key = _descend(draw, root[0])
            part[key] = copy.deepcopy(other[other_key])
        case _:
            value = part[key]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            part[key] = value + draw(st.sampled_from((-1, 1, 64, -64, 2**31))) if number else [value]


@st.composite
def changed_text(draw: Callable[..., Any], original: Any, **style: Any) -> bytes:
    """The JSON text of a changed value; sometimes with a piece in it that is no JSON. `style`: of `json.dumps`."""
    value = draw(changed_json(original))
    if isinstance(value, dict | list) and value and draw(st.integers(0, 5)) == 0:
        part, key = _descend(draw, value)
        part[key] = _RAW_MARK
    text = json.dumps(value, **style)
    raw = draw(st.sampled_from(RAW_JSON)) if _RAW_MARK in text else ""
    return text.replace(f'"{_RAW_MARK}"', raw).encode("utf-8", "surrogatepass")


@st.composite
def sealed(draw: Callable[..., Any], body: dict[str, Any]) -> bytes:
    """A changed body in a sealed file whose digest fits."""
    return seal_text(draw(changed_text(body, sort_keys=True, separators=(",", ":"))))


def seal_text(text: bytes) -> bytes:
    digest = hashlib.sha256(text).hexdigest().encode()
    return text[:-1] + b',"digest":"' + digest + b'"}\n'


@st.composite
def torn(draw: Callable[..., Any], data: bytes) -> bytes:
    """Bytes as a disk or a crash leaves them: flipped, cut, moved, doubled, zeroed."""
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        at, to = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        piece = data[at : min(to, at + draw(st.sampled_from((1, 8, 4096))))]
        match draw(st.sampled_from(("flip", "flip", "cut", "insert", "splice", "zero", "double", "drop"))):
            case "flip" if data:
                index = min(at, len(data) - 1)
                data = data[:index] + bytes([data[index] ^ (1 << draw(st.integers(0, 7)))]) + data[index + 1 :]
            case "cut":
                data = data[:at]
            case "insert":
                data = data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
            case "splice":
                data = data[:to] + piece + data[to + len(piece) :]
            case "zero":
                data = data[:at] + bytes(len(piece)) + data[at + len(piece) :]
            case "double":
                data = data[:at] + piece + data[at:]
            case _:
                data = data[:at] + data[at + len(piece) :]
    return data


def amounts(quick: int, many: int) -> pytest.MarkDecorator:
    """A few examples in every run of the tests, many in the crash suite."""
    return pytest.mark.parametrize(
        "num", [quick, pytest.param(many, marks=(pytest.mark.crash, pytest.mark.timeout(3000)))]
    )


def fuzz(cases: st.SearchStrategy[T], check: Callable[[T], None], num: int, *, both: bool = True) -> Counter[str]:
    """`check` reads each case, and fails where what it got is not what the file says. It may raise a DinoExpError.

    Nothing else may come out of it. With `both`, some cases must be read and some refused, or the cases are no good.
    """
    outcomes: Counter[str] = Counter()

    @settings(parent=BOUNDED, max_examples=num)
    @given(cases)
    def run(case: T) -> None:
        outcomes[attempt(lambda: check(case))] += 1

    run()
    print(f"{sum(outcomes.values())} hostile files: " + ", ".join(f"{n} {word}" for word, n in outcomes.items()))
    assert not both or min(outcomes[READ], outcomes[REFUSED]) > 0, outcomes
    return outcomes


def attempt(read: Callable[[], object]) -> str:
    """Whether it was read, or refused with one short message. Any other exception passes, and fails the test."""
    message = None
    try:
        read()
    except DinoExpError as error:
        message, code = str(error), error.exit_code
    if message is None:
        return READ
    assert code in (1, 2, 3, 4)
    assert 0 < len(message) <= MAX_MESSAGE, len(message)
    return REFUSED


def agrees(got: Any, said: Any) -> bool:
    """Whether what a reader got out of a file is in the file, as it is there. Unknown members are ignored."""
    if isinstance(got, dict):
        return isinstance(said, dict) and all(agrees(value, said.get(name)) for name, value in got.items())
    if isinstance(got, list):
        return isinstance(said, list) and len(got) == len(said) and all(map(agrees, got, said))
    if isinstance(got, float) and type(said) is int:
        return got == said or got == float(said)
    return type(got) is type(said) and got == said


@contextlib.contextmanager
def memory_bound(more_bytes: int) -> Iterator[None]:
    """Let this process have no more than `more_bytes` beyond what it has: then an allocation fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
