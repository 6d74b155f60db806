"""`python -m dino_exp <noun> <verb>`, the same as `dino-exp <noun> <verb>`."""

import signal
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    if sys.argv[1:2] == ["train"]:  # a Hydra program with a grammar of its own
        from dino_exp import train

        train.main(sys.argv[2:])
    if sys.argv[1:2] == ["evaluate"]:  # the same
        from dino_exp import evaluate

        evaluate.main(sys.argv[2:])
    try:
        from dino_exp.cli.app import run

        code = run()
    except KeyboardInterrupt:  # while it is still importing
        code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    main()
