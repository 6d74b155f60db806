"""The pictures of README, from a real run with a real life: `python -m benchmarks.pictures docs/pictures [outputs]`.

It trains the default experiment, kills it, stops it, and lets it come to its end. About two minutes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import parser_of
from dino_exp.analysis.analyzer import CheckpointAnalyzer
from dino_exp.analysis.figures.attention import draw_attention
from dino_exp.analysis.figures.curves import draw_accuracy
from dino_exp.analysis.figures.timeline import draw_timeline
from dino_exp.analysis.style import Picture
from dino_exp.examination.sight import see

SETTINGS = ('checkpoint.keep.milestones=["25%","50%","75%","100%"]', "logger.report=false")
INTERRUPTIONS = ((280, signal.SIGKILL), (610, signal.SIGTERM))  # after these steps
IMAGE_SIZE = 64  # pixels: the attention of a model for 16 pixels is clearer when it is shown larger images
NUM_IMAGES = 4


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("outputs", type=Path, nargs="?")
    asked = parser.parse_args()
    target: Path = asked.target
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        outputs = asked.outputs or Path(temporary)
        run = CheckpointAnalyzer(recorded_run(outputs))
        for picture in pictures(run):
            for dark in (False, True):
                name = f"{picture.name}{'-dark' if dark else ''}.svg"
                (target / name).write_text(picture.svg(dark=dark))
            print(f"{target / picture.name}.svg: {picture.alt}")


def recorded_run(outputs: Path) -> Path:
    """The run, trained unless it is there."""
    command = [sys.executable, "-m", "dino_exp.train", *SETTINGS, f"paths.outputs={outputs}"]
    runs = outputs / "runs"
    for step, number in INTERRUPTIONS if not runs.is_dir() else ():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and last_step(runs) < step:
            time.sleep(0.05)
        process.send_signal(number)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (run,) = runs.iterdir()
    return run


def last_step(runs: Path) -> int:
    lines = [line for path in runs.glob("*/metrics.jsonl") for line in path.read_text().splitlines(keepends=True)]
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def pictures(run: CheckpointAnalyzer) -> list[Picture]:
    best, per_epoch = run.record.best, run.record.schedule.steps_per_epoch
    sight = see(run.directory, num_images=NUM_IMAGES, image_size=IMAGE_SIZE)
    return [
        draw_accuracy(run.history, per_epoch, best),
        draw_timeline(run.timeline(), run.metric, run.history.series(run.metric), best),
        draw_attention(sight.images, sight.attention),
    ]


if __name__ == "__main__":
    main()
