"""What trackers leave on the disk, read back with TensorBoard's own readers and with wandb's own records."""

from __future__ import annotations

import ast
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs_samples import sample_record

from dino_exp.attempts.tracking import check_packages, draw_rows, has_passed, hparams_of, wandb_id
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose, touched_keys
from dino_exp.errors import RefusedError, UsageError
from dino_exp.loggers.histograms import NUM_BINS, Weights, histogram_of
from dino_exp.loggers.tensorboard_files import TensorBoardFiles
from dino_exp.loggers.wandb_file import HEAD, records
from dino_exp.loggers.wandb_run import WandbRun, check_reachable, run_id

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HPARAMS = {"optimizer.lr": 0.003, "seed": 1, "loss.use_bn": True, "model": "vit"}


def files(folder: Path, attempt: int = 1) -> TensorBoardFiles:
    return TensorBoardFiles(folder, attempt=attempt, run_key="key", hparams=HPARAMS)


def row(step: int) -> dict[str, object]:
    return {"step": step, "loss": step / 7, "kl": "nan" if step == 2 else 0.5, "wall": {"seconds": 0.25}}


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    found.Reload()
    return found


def test_rows_are_scalars_once_each_after_a_torn_file(tmp_path: Path) -> None:
    first = files(tmp_path)
    assert first.open() is None
    first.deliver([row(step) for step in range(5)])
    first.close(1.0, "failed")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])  # a kill in the middle of the last record
    second = files(tmp_path, attempt=2)
    assert second.open() == 3
    second.deliver([row(4), row(5)])
    second.close(1.0, "completed")
    scalars = read(tmp_path).Scalars("loss")
    assert [(event.step, event.value) for event in scalars] == [(step, np.float32(step / 7)) for step in range(6)]
    assert [event.step for event in read(tmp_path).Scalars("kl") if np.isnan(event.value)] == [2]
    assert read(tmp_path).Scalars("wall/seconds")[0].value == 0.25


def test_histograms_count_every_weight_once(tmp_path: Path) -> None:
    values = np.linspace(-1, 3, 1000, dtype=np.float32)
    tracker = files(tmp_path)
    tracker.open()
    for step in (0, 10):
        tracker.weights.append(Weights(step, {"head": values, "bad": np.full(3, np.nan, np.float32)}))
    tracker.deliver([row(10)])
    tracker.close(1.0, "failed")
    again = files(tmp_path, attempt=2)
    assert again.open() == 10
    for step in (10, 20):
        again.weights.append(Weights(step, {"head": values}))
    again.close(1.0, "stopped")
    found = read(tmp_path)
    assert found.Tags()["histograms"] == ["weights/head"]
    assert [event.step for event in found.Histograms("weights/head")] == [0, 10, 20]
    histogram = found.Histograms("weights/head")[0].histogram_value
    assert (sum(histogram.bucket), histogram.num, len(histogram.bucket)) == (1000, 1000, NUM_BINS)
    assert (histogram.min, histogram.max) == (-1, 3)


def test_no_histogram_of_nothing_finite_and_one_of_a_constant() -> None:
    assert histogram_of(np.full((2, 2), np.inf, np.float32)) is None
    found = histogram_of(np.full((2, 2), 0.5, np.float32))
    assert found is not None
    assert (found.num, found.sum, sum(found.bucket)) == (4, 2, 4)


def test_the_hparams_page_finds_settings_and_status(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    tracker = files(tmp_path)
    tracker.open()
    tracker.deliver([row(0)])
    tracker.close(1.0, "completed")
    content = read(tmp_path).PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["optimizer.lr"].number_value == 0.003
    assert start.hparams["loss.use_bn"].bool_value is True
    assert start.group_name == "key"
    assert metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG]).status == 1


def test_a_picture_is_drawn_at_a_good_end_once_for_a_step(tmp_path: Path) -> None:
    made = [{"step": step, "epoch": step / 10, "knn_top1": 0.5 + step / 100, "knn_1shot": 0.3} for step in (10, 20)]
    start = {"step": 0, "epoch": 0.0, "init_knn_top1": 0.4, "pixel_knn_top1": 0.9}
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(one) + "\n" for one in (start, made[0])))
    assert draw_rows(metrics, 10) is None
    metrics.write_text("".join(json.dumps(one) + "\n" for one in (start, *made)))
    png = draw_rows(metrics, 10)
    assert png is not None
    for attempt, outcome in ((1, "preempted"), (2, "stopped"), (3, "stopped")):
        tracker = TensorBoardFiles(tmp_path, attempt=attempt, run_key="key", hparams=HPARAMS, draw=lambda: png)
        tracker.open()
        tracker.deliver([row(20)] if attempt == 1 else [])
        tracker.close(1.0, outcome)
    (image,) = read(tmp_path).Images("k-NN accuracy")
    assert (image.step, image.encoded_image_string) == (20, png)
    assert image.width > image.height > 100


def test_nothing_of_a_tracker_is_imported_before_it_is_chosen() -> None:
    package = Path(__file__).parents[2] / "dino_exp"
    early = [
        f"{path.name}: {ast.unparse(node)}"
        for path in package.rglob("*.py")
        for node in ast.parse(path.read_text()).body  # not those in functions, or for the type checker only
        if isinstance(node, ast.Import | ast.ImportFrom)
        if re.search(r"\b(wandb|tensorboard)\b", ast.unparse(node).replace("dino_exp", ""))
    ]
    assert early == []


def test_an_attempt_without_rows_leaves_no_file_and_a_link_is_refused(tmp_path: Path) -> None:
    tracker = files(tmp_path / "tensorboard")
    assert tracker.open() is None
    tracker.close(1.0, "completed")
    assert not (tmp_path / "tensorboard").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tensorboard").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="is a link"):
        tracker.open()


def test_wandb_follows_no_link_out_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(tmp_path / "elsewhere")
    tracker = WandbRun(
        tmp_path / "run", id="a", mode="offline", project="p", entity=None, label="a", tags=(), note=None, config={},
        secs_to_finish=1,
    )  # fmt: skip
    with pytest.raises(RefusedError, match="is a link"):
        tracker.open()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_tracker_that_is_behind_names_the_command_that_brings_it_the_rest(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    wandb = WandbRun(
        run, id="a", mode="offline", project="p", entity=None, label="a", tags=(), note=None, config={},
        secs_to_finish=1,
    )  # fmt: skip
    for tracker, choice in ((files(run / "tensorboard"), "--tensorboard"), (wandb, "--wandb offline")):
        assert tracker.remedy.endswith(f"`dino-exp runs deliver '{run}' {choice}`")


def test_wandb_offline_leaves_nothing_where_there_is_no_row_for_it(tmp_path: Path) -> None:
    tracker = WandbRun(
        tmp_path, id="a", mode="offline", project="p", entity=None, label="a", tags=(), note=None, config={},
        secs_to_finish=1,
    )  # fmt: skip
    assert tracker.open() is None
    tracker.close(1.0, "completed")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_read_of_what_is_no_wandb_file() -> None:
    assert list(records(b"")) == list(records(b"x" * 100)) == list(records(HEAD)) == []
    assert list(records(HEAD + b"\x00" * 70_000)) == []


def test_an_address_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9 does not answer"):
        check_reachable("http://127.0.0.1:9")


def test_the_id_is_a_function_of_the_run_key() -> None:
    assert run_id("vit_s-12345678-abcdef01") == "vit_s-12345678-abcdef01"
    assert run_id("v" * 80) == run_id("v" * 80) != run_id("v" * 81)
    assert len(run_id("v" * 80)) == 32
    record = sample_record()
    assert wandb_id(replace(record, trackers={"wandb": {"id": "mine"}})) == "mine"
    for strange in (None, 3, "../../x", "", ".hidden", "a" * 65):
        assert wandb_id(replace(record, trackers={"wandb": {"id": strange}})) == record.run_key
    assert wandb_id(replace(record, trackers={"wandb": "mine"})) == record.run_key


def test_weights_are_due_at_the_first_row_after_so_many_steps() -> None:
    rows = {0, 7, 14, 20, 21, 28, 35, 40}
    due = [step for step in sorted(rows) if has_passed(step, 20, rows.__contains__)]
    assert due == [0, 20, 40]
    assert [step for step in (7, 14, 21, 28, 35, 42) if has_passed(step, 20, lambda at: at % 7 == 0)] == [21, 42]


def test_hparams_are_the_identity_without_nulls() -> None:
    found = dict(hparams_of(config_from_mapping(compose(["optimizer.scale_lr_to_batch=null"]))))
    assert found["seed"] == 0
    assert found["optimizer.betas"] == "0.9 0.999"
    assert "optimizer.scale_lr_to_batch" not in found
    assert not [name for name in found if name.startswith(("logger.", "checkpoint.", "paths."))]


@pytest.mark.parametrize(
    ("choice", "tensorboard", "wandb"),
    [
        ("default", False, None),
        ("tensorboard", True, None),
        ("wandb", False, "online"),
        ("[tensorboard,wandb]", True, "online"),
        ("[wandb,tensorboard]", True, "online"),
    ],
)
def test_loggers_compose(choice: str, tensorboard: bool, wandb: str | None) -> None:
    logger = compose([f"logger={choice}", "logger.every_steps=5"])["logger"]
    assert (logger["tensorboard"], logger["wandb"], logger["every_steps"]) == (tensorboard, wandb, 5)
    assert compose([f"logger={choice}"])["logger"]["console"] == "auto"
    assert touched_keys([f"logger={choice}"]) == {"logger.tensorboard", "logger.wandb"}


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    logger = config_from_mapping(compose(["logger=[tensorboard,wandb]"])).logger
    check_packages(logger)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"pip install 'dino-exp\[wandb\]'"):
        check_packages(logger)
    check_packages(config_from_mapping(compose(["logger=tensorboard"])).logger)
