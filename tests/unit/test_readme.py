"""What README says is proven must be there to prove it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_proof_that_readme_names_exists() -> None:
    named = re.findall(
        r"`((?:unit|crash|integration|contract)/test_\w+\.py)(?:::(test_\w+))?`", (ROOT / "README.md").read_text()
    )
    assert len(named) > 20
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / "tests" / file).exists() or f"def {test}" not in (ROOT / "tests" / file).read_text()
    ]
    assert missing == []
