"""What a user waits for before anything happens, against importing torch. `python -m benchmarks.startup`"""

from __future__ import annotations

import subprocess
import sys
import tempfile

from benchmarks.measure import HEADER, in_pairs, parser_of, seconds_of


def main() -> None:
    parser_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as outputs:
        train = [
            sys.executable,
            "-m",
            "dino_exp.train",
            "experiment=digits_smoke",
            f"paths.outputs={outputs}",
        ]
        subprocess.run(
            [*train, "train.stop_after_steps=20", "checkpoint.save.every_steps=1"],
            check=True,
            capture_output=True,
        )
        torch = [sys.executable, "-c", "import torch"]
        listing = [sys.executable, "-m", "dino_exp", "checkpoints", "list", "last", "--outputs", outputs]
        print(HEADER)
        for what, command, target in (
            ("train --help", [*train[:3], "--help"], "≤ 1.2"),
            ("checkpoints list", listing, "≤ 0.5 s"),
        ):
            pairs = in_pairs(lambda c=command: seconds_of(c), lambda: seconds_of(torch), num_pairs=7)
            print(pairs.line(what, "import torch", target), flush=True)


if __name__ == "__main__":
    main()
