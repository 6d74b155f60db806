"""`resume=` of a stranger's run directory: one message, the right exit code; nothing executed, nothing written outside.

In this process, where an exception that nobody expected is a traceback and fails the test. What goes as far as building
a model takes half a second each: a few of those in every run of the tests, all in the crash suite.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.hostile import seal_text
from support.runs import SMOKE, Lab, manifests

from dino_exp.attempts.attempt import Command
from dino_exp.attempts.run import run_attempt
from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.manifest_parse import parse_manifest
from dino_exp.checkpoint.verify import whole_state_digest
from dino_exp.config.canonical import canonical_text
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import _exit_code, compose
from dino_exp.config.stored import CANONICAL_NAME, YAML_NAME, load_stored
from dino_exp.runs import record as record_module
from dino_exp.train import find_target

SMALL = (*SMOKE, "train.batch_size=128", "checkpoint.keep.last=2", "checkpoint.save.every_steps=1")
LAST = "step-000000002.json"
Change = Callable[["Scene"], object]


class Scene:
    """A copy of a run that stopped after two steps, the world outside of it, and a marker that nobody may touch."""

    def __init__(self, root: Path, template: Path) -> None:
        self.outputs, self.outside, self.marker = root / "outputs", root / "outside", root / "executed"
        self.run = self.outputs / "runs" / template.name
        shutil.copytree(template, self.run)
        self.outside.mkdir()
        (self.outside / "file").write_text("precious\n")
        (self.outside / "folder").mkdir()
        (self.outside / "folder" / "file").write_text("precious\n")
        self.checkpoints = self.run / "checkpoints"

    def resume(self) -> tuple[int, str]:
        """Go on for one step; the exit code of the attempt and its message."""
        typed = [f"resume={self.run}", f"paths.outputs={self.outputs}", "train.stop_after_steps=3"]
        paths = {"outputs": str(self.outputs), "cache": str(self.outputs / "cache")}
        composed = {**composed_once(), "resume": str(self.run), "paths": paths}
        command, console = Command(overrides=typed, composed=composed), Console(file=io.StringIO())
        with contextlib.redirect_stderr(io.StringIO()) as written:
            code = _exit_code(lambda: run_attempt(lambda: find_target(composed, typed), command, console))
        return code, written.getvalue()

    def yaml(self, old: str, new: str) -> None:
        path = self.run / YAML_NAME
        text = path.read_text()
        assert old in text
        path.write_text("".join(line for line in text.replace(old, new, 1).splitlines(True) if "# digest" not in line))

    def record(self, **members: Any) -> None:
        """Members of run.json, with a digest that fits."""
        path = self.run / "run.json"
        value = json.loads(path.read_text()) | members
        value.pop("digest")
        path.write_text(json.dumps({**value, "digest": record_module._digest(value)}))

    def manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the newest manifest, whose digests fit all the same. The older checkpoint is taken away."""
        path = self.checkpoints / LAST
        body = unseal(path.read_bytes(), LAST)
        change(body)
        body["state_digest"] = None
        with contextlib.suppress(Exception):
            body["state_digest"] = whole_state_digest(parse_manifest(seal(body), LAST))
        path.write_bytes(seal(body))
        (self.checkpoints / "step-000000001.json").unlink()

    def link(self, name: str, target: str) -> None:
        """Replace a part of the run by a link to something outside that is of its kind."""
        path = self.run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(self.outside / target)

    def world(self) -> dict[str, Any]:
        found = {str(path): path.read_bytes() if path.is_file() else None for path in sorted(self.outside.rglob("*"))}
        return {**found, "executed": self.marker.exists()}


@functools.cache
def composed_once() -> dict[str, Any]:
    return compose([*SMALL, "train.stop_after_steps=3"])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    outputs = tmp_path_factory.mktemp("template") / "outputs"
    typed = [*SMALL, f"paths.outputs={outputs}", "train.stop_after_steps=2"]
    composed = compose(typed)
    before = torch.get_num_threads(), random.getstate(), np.random.get_state(), torch.get_rng_state()
    command, console = Command(overrides=typed, composed=composed), Console(file=io.StringIO())
    assert run_attempt(lambda: find_target(composed, typed), command, console) == 0
    (run,) = (outputs / "runs").iterdir()
    yield run
    torch.set_num_threads(before[0])
    torch.set_deterministic_debug_mode("default")
    random.setstate(before[1])
    np.random.set_state(before[2])
    torch.set_rng_state(before[3])


@pytest.fixture
def scene(tmp_path: Path, template: Path) -> Scene:
    return Scene(tmp_path, template)


def yaml(old: str, new: str) -> Change:
    return lambda scene: scene.yaml(old, new.replace("MARKER", str(scene.marker)))


def both_settings(scene: Scene) -> None:
    scene.yaml("lr: 0.003", "lr: 0.3")
    other = (scene.run / YAML_NAME).read_text()
    changed = compose([*SMALL, "optimizer.lr=0.3"])
    (scene.run / CANONICAL_NAME).write_text(canonical_text(config_from_mapping(changed)))
    assert load_stored(scene.run).optimizer.lr == 0.3
    assert other == (scene.run / YAML_NAME).read_text()


def canonical(text: str) -> Change:
    return lambda scene: (scene.run / CANONICAL_NAME).write_text(text)


def record(**members: Any) -> Change:
    return lambda scene: scene.record(**members)


def replaced(name: str, by: str) -> Change:
    def change(scene: Scene) -> None:
        path = scene.run / name
        if by.startswith("link"):
            path.parent.mkdir(exist_ok=True)
            return scene.link(name, "folder" if path.is_dir() or "folder" in by else "file")
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if by == "pipe":
            os.mkfifo(path)
        elif by == "folder":
            path.mkdir()
        return None

    return change


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda scene: scene.manifest(change)


def both_manifests(by: str) -> Change:
    def change(scene: Scene) -> None:
        for path in scene.checkpoints.glob("step-*.json"):
            replaced(f"checkpoints/{path.name}", by)(scene)

    return change


def state(**values: Any) -> Change:
    return manifest(lambda body: body["state"].update(values))


# In the order in which a reader that does not look would fail: at once, at the next row, at the next evaluation.
STATES = (
    ("step", "2"), ("step", -1), ("step", 2**70), ("step", 2.0), ("step", True), ("loss_sum", "x"), ("healthy", "no"),
    ("loss_count", None), ("collapse_rows", "x"), ("pending_row", 3), ("pending_row", {"wall": 1}), ("best", "x"),
    ("best", {}), ("best", {"step": 1, "metric": 2, "value": 1.0}),
    ("best", {"step": 1, "metric": "x", "value": "x"}),
)  # fmt: skip
PARENT = {"run_key": "x", "step": 1, "state_digest": "s1:", "asked": "last@best", "settings": "c1:"}


def without_checkpoints(parent: Any) -> Change:
    """A child that has not saved yet, and so looks for its parent."""

    def change(scene: Scene) -> None:
        shutil.rmtree(scene.checkpoints)
        (scene.run / "events.jsonl").unlink()
        scene.record(parent=parent, step=0)

    return change


REFUSED = {
    "a tag that calls the shell": (4, yaml("seed: 0", "seed: !!python/object/apply:os.system ['touch MARKER']"), "tag"),
    "a tag that imports": (4, yaml("seed: 0", "seed: !!python/module:antigravity"), "tag"),
    "_target_": (3, yaml("seed: 0", "seed: 0\n_target_: os.system\n_args_: ['touch MARKER']"), "_target_"),
    "_target_ in a section": (3, yaml("depth: 1", "depth: 1\n  _target_: os.system"), "_target_"),
    "_partial_ and _recursive_": (3, yaml("seed: 0", "seed: 0\n_partial_: true\n_recursive_: true"), "_partial_"),
    "an environment variable": (3, yaml("seed: 0", "seed: ${oc.env:HOME}"), "interpolation"),
    "a reference": (3, yaml("lr: 0.003", "lr: ${seed}"), "interpolation"),
    "a resolver that evaluates": (
        3,
        yaml("lr: 0.003", "lr: ${eval:__import__('os').system('touch MARKER')}"),
        "interpol",
    ),
    "paths": (3, yaml("seed: 0", "seed: 0\npaths: {outputs: /}"), "paths"),
    "hydra's own": (3, yaml("seed: 0", "seed: 0\nhydra: {run: {dir: /}}"), "hydra"),
    "defaults": (3, yaml("seed: 0", "seed: 0\ndefaults: [x]"), "defaults"),
    "yaml and canonical disagree": (3, yaml("lr: 0.003", "lr: 0.3"), "disagree"),
    "canonical is a list": (3, canonical("[1]"), "disagree"),
    "canonical is torn": (4, canonical('{"seed":'), "JSON"),
    "canonical is deep": (4, canonical("[" * 999 + "]" * 999), "nested"),
    "both are of another run": (3, both_settings, "run.json"),
    "config.yaml is a link": (4, replaced(YAML_NAME, "link"), "link"),
    "config.yaml is a pipe": (4, replaced(YAML_NAME, "pipe"), "special"),
    "config.yaml is a folder": (4, replaced(YAML_NAME, "folder"), "folder"),
    "config.yaml is gone": (3, replaced(YAML_NAME, "nothing"), "missing"),
    "the canonical text is a link": (4, replaced(CANONICAL_NAME, "link"), "link"),
    "run.json is a link": (4, replaced("run.json", "link"), "link"),
    "run.json is a pipe": (2, replaced("run.json", "pipe"), "run.json"),
    "run.json is a folder": (2, replaced("run.json", "folder"), "run.json"),
    "a step in words": (4, record(step="3"), "step"),
    "attempts that are no list": (4, record(attempts={}), "attempts"),
    "a key that leads out": (4, record(run_key="../../etc"), "run_key"),
    "a variant that leads out": (4, record(variant="../../x"), "run_key"),
    "a record of a newer version": (3, record(format=9), "format"),
    "an unknown member": (4, record(_target_="os.system"), "unknown member"),
    "manifests that are links": (4, both_manifests("link"), "link"),
    "manifests that are pipes": (4, both_manifests("pipe"), "special"),
    "manifests that are folders": (4, both_manifests("folder"), "folder"),
    "events that are a link": (4, replaced("events.jsonl", "link"), "link"),
    "metrics that are a link": (4, replaced("metrics.jsonl", "link"), "metrics"),
    "a lock that is a link": (3, replaced("lock", "link"), "lock"),
    "a manifest of another run": (3, manifest(lambda body: body["record"].update(config_hash="c1:0")), "belongs"),
    "a manifest without a tensor": (1, manifest(lambda body: body["tensors"].pop("loss.center")), "loss.center"),
    "a manifest of a newer version": (4, manifest(lambda body: body.update(format_version=7)), "newer"),
    "a pack that leads out": (4, manifest(lambda body: body["packs"][0].update(name="../../../outside/file")), "pack"),
    "packs that are a link": (4, replaced("checkpoints/packs", "link"), "link"),
    "a quarantine that is a link": (4, replaced("checkpoints/quarantine", "link"), "link"),
    **{f"a state whose {name} is {value!r}"[:60]: (4, state(**{name: value}), name) for name, value in STATES},
    "a state of another step": (4, state(step=3), "state is of step 3"),
    "no position of the rows": (4, manifest(lambda body: body["aside"].clear()), "rows"),
    "a position in words": (4, manifest(lambda body: body["aside"].update(metrics_rows="2")), "rows"),
    "a negative position": (4, manifest(lambda body: body["aside"].update(metrics_bytes=-1)), "rows"),
    "a position beyond every file": (4, manifest(lambda body: body["aside"].update(metrics_bytes=2**70)), "rows"),
    "a parent that leads out of the folder": (3, without_checkpoints({**PARENT, "run_key": "../../outside"}), "parent"),
    "a parent of nonsense": (3, without_checkpoints({"run_key": 3}), "parent"),
    "a log that is a link": (3, replaced("train.log", "link"), "train.log"),
    "a log that is a pipe": (3, replaced("train.log", "pipe"), "train.log"),
    "settings typed that are a link": (3, replaced(".hydra", "link"), ".hydra"),
    "attempts that are a link": (3, replaced(".hydra/attempts", "link to a folder"), "attempts"),
    "an attempt that is a link": (3, replaced(".hydra/attempts/002", "link to a folder"), "002"),
    "code that is a link": (3, replaced("code", "link"), "code"),
    "checkpoints that are a link": (4, replaced("checkpoints", "link"), "link"),
}


BUILDS = tuple(name for name in REFUSED if re.search("manifest|pack|checkpoints|state|position", name))
QUICK = (
    "manifests that are links", "a pack that leads out", "a manifest of another run", "packs that are a link",
    "a state of another step", "a state whose best is {}", "no position of the rows",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.crash) if name in BUILDS and name not in QUICK else name for name in REFUSED],
)
def test_it_is_refused_with_one_message(name: str, scene: Scene) -> None:
    expected, change, says = REFUSED[name]
    change(scene)
    before = scene.world()
    code, message = scene.resume()
    assert (code, says in message) == (expected, True), (code, message)
    assert scene.world() == before


def threads(recorded: Any) -> Change:
    """The number that the first attempt had counts where the settings give none."""

    def change(scene: Scene) -> None:
        if "threads: 1" in (scene.run / YAML_NAME).read_text():
            scene.yaml("threads: 1", "threads: null")
        scene.record(numerics={**json.loads((scene.run / "run.json").read_text())["numerics"], "threads": recorded})

    return change


HARMLESS = {
    "text like an interpolation in a note": yaml("note: null", "note: ${oc.env:HOME}"),
    "an index of nonsense": lambda scene: (scene.checkpoints / "registry.json").write_bytes(
        seal_text(b'{"versions":3}')
    ),
    "an index that is a pipe": replaced("checkpoints/registry.json", "pipe"),
    "an index that is a link": replaced("checkpoints/registry.json", "link"),
    "an owner that is a link": replaced("owner.json", "link"),
    "an owner of nonsense": lambda scene: (scene.run / "owner.json").write_text('{"pid": "x"}'),
    "a report of a failure that is a link": replaced("FAILED.txt", "link"),
    "temporary files that are links": lambda scene: [
        scene.link(name, "file")
        for name in (".run.json.tmp", ".owner.json.tmp", "checkpoints/.step-000000003.json.tmp")
    ],
    "a best of markup, in the far future": record(best={"step": 2**62, "metric": "[/x]", "value": "nan"}),
    "metrics of every kind": record(metrics={"loss": "nan", "x" * 900: 1e308, "[/x]": "-inf", "\x1b[2J": 1}),
    "a parent that leads out": record(parent={"run_key": "../../x", "step": "x"}),
    "a parent that is a list": record(parent=[1]),
    "threads beyond every machine": threads(2**40),
    "threads in words": threads("2"),
    "no threads": threads(0),
    "an absurd schedule": record(schedule={"horizon_steps": 2**62, "steps_per_epoch": 1}),
    "a pack of the next step that is a link": replaced(
        "checkpoints/packs/step-000000003.a002.r00000.safetensors", "link"
    ),
}


@pytest.mark.parametrize("name", ["all at once", *(pytest.param(name, marks=pytest.mark.crash) for name in HARMLESS)])
def test_it_is_passed_over(name: str, scene: Scene) -> None:
    """The run goes on, and what it was led to outside stays as it was."""
    for change in HARMLESS.values() if name == "all at once" else [HARMLESS[name]]:
        change(scene)
    before = scene.world()
    code, message = scene.resume()
    assert (code, message) == (0, "")
    assert scene.world() == before
    assert max(manifests(scene.run)) == 3


@pytest.mark.crash
def test_the_same_through_real_commands(scene: Scene, tmp_path: Path) -> None:
    lab = Lab(tmp_path, settings=())
    REFUSED["a tag that calls the shell"][1](scene)
    for line in (lab.train(f"resume={scene.run}", code=4), lab.train(f"fork={scene.run}", "optimizer.lr=1", code=4)):
        assert "tag" in line
        assert "Traceback" not in line
    for verb in ("list", "show", "verify"):  # these need no settings
        assert lab.cli("checkpoints", verb, str(scene.run))
    assert not scene.marker.exists()
