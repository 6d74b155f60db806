"""Evaluations of checkpoints made without training: what is refused and how, and where the results go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_samples import Result, cli, contents
from weights_samples import COLOUR, make_weights_run, teacher_of, trained_state

from dino_exp import build
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.config.schema import Config
from dino_exp.data.datasets import ArrayDataset
from dino_exp.data.digits import load_digits_split
from dino_exp.errors import ConfigError
from dino_exp.evaluation.attention import class_attention
from dino_exp.examination.kinds import choose_images
from dino_exp.examination.results import json_text
from dino_exp.examination.subject import Subject, recorded_settings
from dino_exp.runs.named import named
from dino_exp.weights.source import CheckpointWeights, open_checkpoint

STATE = trained_state()
STEP = "step-000000004"


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights_run(tmp_path_factory.mktemp("outputs"), STATE)


def evaluate(run: Path, out: Path | None, *words: str) -> Result:
    """`dino-exp evaluate of=<run> ...` in this process."""
    place = f"out={out}" if out is not None else f"paths.outputs={run.parents[1]}"
    return cli(f"of={run}", place, "runtime.threads=1", *words, noun="evaluate")


def refused(code: int, result: Result, *parts: str) -> None:
    assert result.code == code, result.err
    assert all(part in result.err for part in parts), result.err
    assert "Traceback" not in result.err


def test_the_maps_are_those_of_the_teacher_and_the_run_stays_as_it_is(run: Path) -> None:
    before = contents(run)
    done = evaluate(run, None, "evaluation=attention", "evaluation.images=[5,0]")
    assert done.code == 0, done.err
    assert contents(run) == before
    folder = run.parents[1] / "evaluations" / run.name / STEP
    assert {path.name for path in folder.iterdir()} == {"attention.json", "attention.svg", "attention.png"}
    assert f"wrote {folder / 'attention.json'}" in done.lines
    found = json.loads((folder / "attention.json").read_text())
    assert (found["run_key"], found["step"], found["part"]) == (run.name, 4, "teacher")
    assert found["state_digest"] == CheckpointReader(run / "checkpoints").state_digest(4)
    assert found["git_commit"] == "f" * 40
    assert found["data"]["same_as_in_training"] is None  # this checkpoint does not say which data it was
    assert found["pictures"] == ["attention.svg", "attention.png"]
    val = load_digits_split("val")
    assert [image["index"] for image in found["details"]["images"]] == [5, 0]
    assert [image["label"] for image in found["details"]["images"]] == val.labels(np.array([5, 0])).tolist()
    clean = (
        torch.nn.functional.interpolate(val.images(np.array([5, 0])).pixels_BCHW / 255, 16, mode="bilinear") - 0.3054
    ) / 0.3761
    expected = class_attention(teacher_of(STATE), clean)
    assert torch.allclose(torch.tensor(found["details"]["images"][0]["attention"]), expected[0], atol=1e-5)
    assert torch.allclose(torch.tensor(found["details"]["images"][1]["mean"]), expected[1].mean(dim=0), atol=1e-5)


def test_a_larger_image_has_more_patches_and_out_says_where(run: Path, tmp_path: Path) -> None:
    words = ("evaluation=features", "evaluation.images=9", "evaluation.image_size=32", "part=student")
    assert evaluate(run, tmp_path / "here" / "too", *words).code == 0
    found = json.loads((tmp_path / "here" / "too" / "features-student.json").read_text())
    assert (found["details"]["image_size"], found["details"]["grid"]) == ([32, 32], [8, 8])
    assert [image["label"] for image in found["details"]["images"]] == list(range(9))
    assert 0 < sum(found["details"]["explained_variance"]) <= 1
    assert np.shape(found["details"]["images"][0]["colours"]) == (8, 8, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluation.k=[5,1438]"], "evaluation.k=1438: digits/train has 1437 images; choose at most 1437"),
        (["evaluation.train_images=19"], "digits/train has 19 images chosen by evaluation.train_images=19"),
        (["evaluation.train_images=60"], "evaluation.labels_per_class=10: a class of digits/train has"),
        (["evaluation.labels_per_class=200"], "a class of digits/train has 139 images"),
        (["evaluation=linear", "evaluation.labels_per_class=200"], "choose at most 139"),
        (["evaluation=linear", "evaluation.num_blocks=3"], "the model has 2 blocks"),
        (["evaluation=linear", "evaluation.lr=[]"], "evaluation.lr=[]: expected one learning rate or more"),
        (["evaluation.k=[]", "evaluation.labels_per_class=[]"], "nothing to measure"),
        (["evaluation=attention", "evaluation.images=65"], "asks for 65 images of digits/val"),
        (["evaluation=attention", "evaluation.images=[]"], "asks for 0 images"),
        (["evaluation=features", "evaluation.images=[360]"], "digits/val has no image 360; expected 0 to 359"),
        (["evaluation=attention", "evaluation.image_size=18"], "try evaluation.image_size=16"),
    ],
)  # fmt: skip
def test_what_data_and_model_do_not_have_is_refused(run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    refused(2, evaluate(run, tmp_path / "out", *words), message)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_into_a_run(run: Path) -> None:
    before = contents(run)
    refused(2, evaluate(run, run / "pictures"), "inside of the run", "only its owner writes")
    assert contents(run) == before


def test_a_file_of_weights_and_an_unknown_run_are_refused(run: Path, tmp_path: Path) -> None:
    refused(2, cli("of=teacher.safetensors", noun="evaluate"), "of=<run>@<step>")
    refused(2, cli("of=nobody", f"paths.outputs={tmp_path}", noun="evaluate"), "nobody")
    refused(4, cli(f"of={run}@77", noun="evaluate"), "no checkpoint of step 77; steps here: 4")


def test_a_thinned_checkpoint_has_no_student(tmp_path: Path) -> None:
    thin = make_weights_run(tmp_path, STATE, only=("teacher.",))
    refused(4, evaluate(thin, None, "part=student"), "holds no student, only the teacher", "thinned")
    assert evaluate(thin, None, "evaluation.labels_per_class=[]", "evaluation.k=1").code == 0


def test_a_damaged_checkpoint_is_exit_4_and_leaves_nothing(tmp_path: Path) -> None:
    damaged = make_weights_run(tmp_path, STATE)
    (pack,) = (damaged / "checkpoints" / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    for at in range(4096, len(data), 1024):
        data[at] ^= 1
    pack.write_bytes(data)
    refused(4, evaluate(damaged, None), "teacher.backbone.", f"dino-exp checkpoints verify {damaged}")
    assert not (tmp_path / "evaluations").exists()


def test_a_checkpoint_that_a_training_drops_meanwhile_is_exit_4(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: CheckpointWeights, prefix: str) -> None:
        raise FileNotFoundError(prefix)

    monkeypatch.setattr(CheckpointWeights, "tensors", gone)
    refused(4, evaluate(run, None), "@4: it is gone", f"dino-exp checkpoints list {run}")


def test_weights_that_are_no_numbers_are_exit_4(tmp_path: Path) -> None:
    state = trained_state()
    with torch.no_grad():
        teacher_of(state).norm.bias[3] = torch.nan
    refused(4, evaluate(make_weights_run(tmp_path, state), None), "norm.bias holds values that are no numbers")


def test_a_learning_rate_that_is_far_too_large_does_no_harm(run: Path, tmp_path: Path) -> None:
    words = ("evaluation=linear", "evaluation.epochs=2", "evaluation.lr=[1e6,0.1]")
    assert evaluate(run, tmp_path, *words).code == 0
    found = json.loads((tmp_path / "linear.json").read_text())
    assert [probe["lr"] for probe in found["details"]["probes"]] == [1e6, 0.1]


def test_json_has_null_for_what_is_no_number() -> None:
    text = json_text({"loss": float("nan"), "of": [{"a": float("inf")}, (1, 2.5)]})
    assert json.loads(text) == {"loss": None, "of": [{"a": None}, [1, 2.5]]}
    assert "[1, 2.5]" in text


@pytest.mark.parametrize("record", [{"config": "{}"}, {"config": '{"seed": 0, "data": {"name": "mine"}}'}])
def test_settings_of_strangers_are_exit_4(tmp_path: Path, record: dict[str, str]) -> None:
    refused(4, evaluate(make_weights_run(tmp_path, STATE, **record), None), "settings")


def test_the_name_that_a_stranger_gives_a_run_leads_nowhere(tmp_path: Path) -> None:
    run = make_weights_run(tmp_path / "outputs", STATE, run_key="../../away")
    assert evaluate(run, None, "evaluation=attention", "evaluation.images=1").code == 0
    assert (tmp_path / "outputs" / "evaluations" / run.name / STEP / "attention.json").exists()
    assert not list(tmp_path.rglob("away"))


def test_other_data_than_in_training_is_told(tmp_path: Path) -> None:
    run = make_weights_run(tmp_path, STATE, data_fingerprint="sha256:" + "0" * 64)
    done = evaluate(run, None, "evaluation.labels_per_class=[]", "evaluation.k=[1]")
    assert done.code == 0
    assert "warning: digits/train is not the data that" in done.err
    found = json.loads((tmp_path / "evaluations" / run.name / STEP / "knn.json").read_text())
    assert found["data"]["same_as_in_training"] is False
    assert list(found["metrics"]) == ["knn1_top1"]


def test_colour_images_and_their_normalisation(tmp_path: Path) -> None:
    run = make_weights_run(tmp_path, trained_state(COLOUR), COLOUR)
    done = evaluate(run, None, "evaluation=features", "evaluation.images=3")
    assert done.code == 0, done.err
    assert "variance explained" in done.out


@pytest.mark.parametrize("config", [None, COLOUR])
def test_the_crops_are_those_of_the_training(tmp_path: Path, config: Config | None) -> None:
    state = (trained_state(),) if config is None else (trained_state(config), config)
    run, out, ids = make_weights_run(tmp_path, *state), tmp_path / "out", np.array([5, 0])
    assert evaluate(run, out, "evaluation=crops", "evaluation.images=[5,0]", "evaluation.epoch=3").code == 0
    assert {path.name for path in out.iterdir()} == {"crops.json", "crops.svg", "crops.png"}
    found = json.loads((out / "crops.json").read_text())["details"]
    checkpoint = named(str(run), tmp_path)
    weights = open_checkpoint(checkpoint)
    recorded = recorded_settings(weights)
    augment, train = build.build_augment(recorded), build.build_data(recorded.data).train
    large = [{"name": name, "size": [augment.global_size] * 2} for name in ("clean", "global 1", "global 2")]
    small = [{"name": f"local {view + 1}", "size": [augment.local_size] * 2} for view in range(augment.num_local_crops)]
    assert found["views"] == large + small
    assert found["images"] == [
        {"index": int(at), "label": int(train.labels(ids)[place])} for place, at in enumerate(ids)
    ]
    subject = Subject(
        weights=weights, facts={}, paths=checkpoint.paths, part="teacher", recorded=recorded,
        device=torch.device("cpu"), progress=lambda *_: None,
    )  # fmt: skip
    shown = subject.crops(ids, 3)
    expected = [augment.clean(train.images(ids)), *augment(train.images(ids), torch.from_numpy(ids), 3)]
    for view, crops in zip(shown, expected, strict=True):
        assert view.shape == (2, *crops.shape[2:], train.channels)
        # One factor and one offset undo the normalisation of a channel; what is beyond black and white is cut off.
        pixels, seen = view[..., 0].flatten(), crops[:, 0].flatten()
        inside = (pixels > 0) & (pixels < 1)
        assert float(torch.corrcoef(torch.stack([pixels[inside], seen[inside]]))[0, 1]) > 0.99999
    assert abs(float(shown[0].mean()) - float(train.images(ids).pixels_BCHW.float().mean()) / 255) < 0.02


def test_no_training_image_of_that_number_and_no_such_epoch(run: Path, tmp_path: Path) -> None:
    words = ("evaluation=crops", "evaluation.images=[1437]")
    refused(2, evaluate(run, tmp_path, *words), "digits/train has no image 1437; expected 0 to 1436")
    refused(2, evaluate(run, tmp_path, "evaluation=crops", "evaluation.epoch=-1"), "evaluation.epoch")


def test_labels_are_needed_where_classes_are_told_apart(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load_digits_split("val")
    for num_classes, has in ((1, "one class only"), (0, "no labels")):
        blank = replace(digits, num_classes=num_classes, labels_N=np.zeros(len(digits), np.int64))
        monkeypatch.setattr("dino_exp.build.images.load_digits_split", lambda _, blank=blank: blank)
        for kind in ("knn", "linear"):
            refused(2, evaluate(run, tmp_path, f"evaluation={kind}"), f"evaluation={kind}", has, "need no labels")
    assert evaluate(run, tmp_path, "evaluation=features", "evaluation.images=1").code == 0
    (image,) = json.loads((tmp_path / "features.json").read_text())["details"]["images"]
    assert set(image) == {"index", "colours"}  # and no label


def test_images_are_chosen_of_all_classes_in_turn() -> None:
    labels = np.array([2, 2, 0, 1, 0, 2])
    dataset = ArrayDataset(
        name="six", version="1", num_classes=3, images_NCHW=np.zeros((6, 1, 2, 2), np.uint8), labels_N=labels
    )
    assert choose_images(dataset, 6).tolist() == [2, 3, 0, 4, 1, 5]
    assert choose_images(dataset, 2).tolist() == [2, 3]
    assert choose_images(dataset, (5, 5)).tolist() == [5, 5]
    with pytest.raises(ConfigError, match="asks for 7 images of six, which has 6: expected 1 to 6"):
        choose_images(dataset, 7)


def test_ranks_do_not_evaluate(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(2, evaluate(run, None), "rank 1 of 2", "without torchrun")
