"""The command line as a user meets it: real processes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import JobEnd, hydra_main, touched_keys
from dino_exp.errors import RefusedError

def task(settings, overrides):
    config = config_from_mapping(settings)
    if config.seed == 3:
        raise RefusedError("no seed 3 here")
    if config.seed == 4:
        raise SystemExit(143)
    if config.seed == 7:
        raise SystemExit(137)
    if config.seed == 5:
        raise ValueError("our own bug")
    print("ran", config.model.name, config.seed, sorted(touched_keys(overrides)), overrides)
    return JobEnd(0, None if config.seed == 9 else -((config.seed - 20.5) ** 2))

class Watcher:
    def starts(self, sweep):
        if sweep.settings.name == "bug":
            raise TypeError("our own bug")
        if sweep.settings.name == "refused":
            raise RefusedError("no such sweep here")
        if sweep.settings.dry_run:
            print(sweep.sweeper, sweep.launcher, sweep.typed, sweep.jobs)
            return 0

    def ends(self, codes):
        return next((code for code in codes if code), 0)

sys.exit(hydra_main(task, Watcher))
"""


CLIMB = """
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Climb(Sweeper):
    def __init__(self, max_batch_size, params):
        pass

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        values = []
        for seed in (10, 20, 30, 3, 9):
            (job,) = self.launcher.launch([[*arguments, f"seed={seed}"]], initial_job_idx=len(values))
            values.append(job.return_value)
        print("climbed", values)
"""


@pytest.fixture
def command(tmp_path):
    script = tmp_path / "app.py"
    script.write_text(SCRIPT)
    here = tmp_path / "cwd"
    here.mkdir()
    root = str(Path(__file__).parents[2])

    def call(*arguments: str, warnings: str = "error") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-W", warnings, str(script), *arguments],
            cwd=here,
            env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert {path.name for path in here.iterdir()} <= {"outputs"}
        assert "--multirun" in arguments or list(here.iterdir()) == []
        return done

    return call


def test_a_job_gets_its_settings_and_overrides(command):
    done = command("model=vit_s", "seed=2", "train.stop_after_steps=1")
    assert done.returncode == 0
    assert done.stdout.startswith("ran vit_s 2 ['model.depth', ")
    assert done.stdout.endswith("['model=vit_s', 'seed=2', 'train.stop_after_steps=1']\n")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lrr=1"], "configuration: lrr: there is no such setting; did you mean optimizer.lr?\n"),
        (["model.num_heads=5"], "configuration: model.num_heads=5 does not divide model.embed_dim=64"),
        (["model=vit_x"], "configuration: model=vit_x: there is no such choice; there are vit_b"),
        (["model=null", "seed=1"], "configuration: model=null: expected one of vit_b, vit_l, vit_nano, vit_s, vit_t\n"),
        (["seed=0,1"], "--multirun"),
        (["--multirun", "--cfg", "job"], "Only one of --run, --multirun"),
        (["--help", "lrr=1"], "configuration: lrr: there is no such setting; did you mean optimizer.lr?\n"),
    ],
)
def test_a_wrong_command_exits_2_with_one_message(command, arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_of_the_job_keeps_its_exit_code_and_a_bug_its_traceback(command):
    refused = command("seed=3")
    assert (refused.returncode, refused.stderr) == (3, "no seed 3 here\n")
    assert command("seed=4").returncode == 143
    bug = command("seed=5")
    assert bug.returncode == 1
    assert "ValueError: our own bug" in bug.stderr


def test_a_failing_job_does_not_end_the_sweep_and_a_signalled_one_does(command):
    done = command("--multirun", "seed=1,3,-2,7,2,4,6")  # 7: for want of memory, say
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["1", "2"]
    assert done.returncode == 3
    assert done.stderr == "no seed 3 here\nconfiguration: seed: expected at least 0, got -2\n"


def test_a_sweep_is_announced_before_its_jobs(command):
    words = ("--multirun", "seed=1,2", "model=vit_nano,vit_t", "train.epochs=3", "sweep.dry_run=true")
    done = command(*words)
    assert (done.returncode, done.stderr) == (0, "")
    jobs = [(f"seed={seed}", f"model={model}", "train.epochs=3") for seed in (1, 2) for model in ("vit_nano", "vit_t")]
    assert done.stdout == f"BasicSweeper BasicLauncher {words[1:]} {tuple(jobs)}\n"


def test_a_sweeper_gets_what_each_job_measured(command, tmp_path):
    """`Climb` launches jobs of its own choice, as Optuna's sweeper does."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "climb.py").write_text(CLIMB)
    done = command("--multirun", "hydra.sweeper._target_=hydra_plugins.climb.Climb")
    assert "climbed [-110.25, -0.25, -90.25, nan, nan]" in done.stdout, done.stderr
    assert done.returncode == 3  # one of them was refused


def test_a_bug_while_a_sweep_is_announced_runs_no_job(command):
    done = command("--multirun", "seed=1,2", "sweep.name=bug", warnings="default")  # as an error, Hydra's would do
    assert done.returncode == 1
    assert "TypeError: our own bug" in done.stderr
    assert "ran" not in done.stdout


def test_a_sweep_may_be_refused(command):
    done = command("--multirun", "seed=1,2", "sweep.name=refused")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "no such sweep here\n")


def test_help_explains_commands_choices_and_settings(command):
    done = command("--help")
    assert done.returncode == 0
    for part in (
        "checkpoint=rotating model=vit_s",
        "resume=<run>",
        "model: vit_b, vit_l",
        "  batch_size: 64",
    ):
        assert part in done.stdout


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--info", "defaults"], ["--version"], ["--hydra-help"]])
def test_hydras_own_options_still_work(command, arguments):
    done = command(*arguments)
    assert done.returncode == 0
    assert done.stdout
    assert "ran" not in done.stdout.split()
