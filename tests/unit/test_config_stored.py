import os

import pytest
import yaml
from config_examples import config

from dino_exp.config.canonical import canonical_text, config_hash
from dino_exp.config.compare import as_mapping
from dino_exp.config.stored import CANONICAL_NAME, YAML_NAME, load_stored, write_stored, yaml_text
from dino_exp.errors import RefusedError
from dino_exp.fsio import DamagedFileError


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "outputs" / "runs" / "vit_nano-1-2"
    directory.mkdir(parents=True)
    write_stored(config("run.note='für später'", "paths.outputs=/gone", "resume=last"), directory)
    return directory


def edit(run, old, new):
    path = run / YAML_NAME
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=vit_s", "run.tags=[a,b]", "checkpoint=milestones"],
        ["data=synthetic", "augment=dino", "loss=dino", "optimizer=sgd", "scheduler=constant"],
        ["optimizer.lr=1.2345678901234567e-7", "run.variant='1e3'", "run.note='a: b # c'"],
    ],
)
def test_round_trip(tmp_path, overrides):
    stored = config(*overrides)
    write_stored(stored, tmp_path)
    loaded = load_stored(tmp_path)
    assert as_mapping(loaded) | {"paths": None} == as_mapping(stored) | {"paths": None}
    assert config_hash(loaded) == config_hash(stored)


def test_the_files_say_the_hash_and_exactly_what_was_hashed(run):
    loaded = load_stored(run)
    assert (run / CANONICAL_NAME).read_text() == canonical_text(loaded)
    assert config_hash(loaded) in (run / YAML_NAME).read_text()
    assert loaded.run.note == "für später"


def test_a_moved_run_knows_where_it_is_and_not_where_it_was(run, tmp_path):
    moved = tmp_path / "else" / "runs" / "x"
    moved.parent.mkdir(parents=True)
    run.rename(moved)
    loaded = load_stored(moved)
    assert loaded.paths.outputs == str(tmp_path / "else")
    assert loaded.resume is None
    assert "/gone" not in (moved / YAML_NAME).read_text()


def test_an_edited_identity_is_refused_and_named(run):
    edit(run, "lr: 0.003", "lr: 0.3")
    with pytest.raises(RefusedError, match=r"disagree:\n  optimizer\.lr: 0\.3 here, 0\.003 in config\.canonical\.json"):
        load_stored(run)


def test_an_edited_setting_outside_the_identity_is_noticed(run):
    edit(run, "note: für später", "note: für immer")
    with pytest.raises(RefusedError, match="not the settings that were written"):
        load_stored(run)
    path = run / YAML_NAME
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("# digest:")))
    assert load_stored(run).run.note == "für immer"


def test_an_edited_canonical_text_is_refused(run):
    path = run / CANONICAL_NAME
    path.write_text(path.read_text() + "\n")
    with pytest.raises(RefusedError, match="the same values, written differently"):
        load_stored(run)
    path.write_text("{")
    with pytest.raises(DamagedFileError, match="not strict JSON"):
        load_stored(run)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 0", "seed: ${now:%S}", "seed: an interpolation; only plain values are read"),
        ("seed: 0", "seed: 0\n_target_: os.system", "_target_: there is no such setting"),
        ("depth: 2", "depth: 2\n  _target_: os.system", "model._target_: there is no such setting"),
        ("seed: 0", "seed: 0\npaths: {outputs: /etc}", "paths: never taken from a run"),
        ("seed: 0", "seed: 0\nresume: x", "resume: never taken from a run"),
        ("seed: 0", "seed: -1", "seed: expected at least 0"),
        ("seed: 0", "", "seed: no value is given"),
        ("seed: 0", "seed: 2001-01-01", "seed: expected a whole number"),
        ("depth: 2", "depth: 2\n  1: 2", "model.1: there is no such setting"),
    ],
)
def test_settings_that_are_not_ours_are_refused(run, old, new, message):
    edit(run, old, new)
    with pytest.raises(RefusedError) as caught:
        load_stored(run)
    assert message in str(caught.value)


LAUGHS = "a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]\n"


@pytest.mark.parametrize(
    "content",
    [
        "seed: !!python/object/apply:os.system ['true']",
        "seed: !!python/name:os.system",
        "!!int '0'",
        LAUGHS,
        "seed: &x 1",
        "<<: {seed: 1}",
        "seed: 0\nseed: 1",
        "? [1, 2]\n: 3",
        "[" * 5000 + "]" * 5000,
        "a: " * 50,
        "a: [" + "1," * 30_000 + "]",
        "seed: " + "9" * 10_000,
        "seed: 2001-99-99",
        "seed: 'open",
        "a: 1\n---\nb: 2",
        "\x00",
        "# " + "x" * 2_000_000,
    ],
    ids=lambda content: content[:24],
)
def test_hostile_yaml_is_refused_before_it_is_built(run, content):
    (run / YAML_NAME).write_text(content)
    with pytest.raises(DamagedFileError) as caught:
        load_stored(run)
    assert YAML_NAME in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", ["", "3", "- seed", "null"])
def test_something_else_than_settings_is_refused(run, content):
    (run / YAML_NAME).write_text(content)
    with pytest.raises(RefusedError, match="expected settings, found"):
        load_stored(run)


def test_bytes_that_are_no_text_links_and_pipes_are_refused(run):
    path = run / YAML_NAME
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DamagedFileError):
        load_stored(run)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DamagedFileError, match="not a regular one"):
        load_stored(run)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedFileError, match="not a regular one"):
        load_stored(run)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_stored(run)


def test_the_yaml_is_plain_and_in_the_order_of_the_schema():
    text = yaml_text(config())
    assert text.startswith("# The settings of this run")
    assert list(yaml.safe_load(text))[:4] == ["seed", "origin", "model", "init"]
