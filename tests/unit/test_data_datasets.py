import numpy as np
import pytest

from dino_exp.data.datasets import ArrayDataset
from dino_exp.data.digits import load_digits_split
from dino_exp.data.synthetic import SyntheticDataset
from dino_exp.errors import ConfigError

# The content of record: a scikit-learn that split or stored them differently must not go unnoticed.
DIGITS_TRAIN = "sha256:99374c512f2bb48c72bf6932e0a118c86e83cd42a243ac7e3153e67a2f04c7c6"
DIGITS_VAL = "sha256:6d40921014d249aae43fb4534204081bea69d08e89a0c7f9dd80b604de1a758d"
SYNTHETIC = "sha256:b5e38b816a2538eaa123800f6acfab99049fdd579b7f484ed3d5d4d6b4d474d3"


def test_digits_split_is_the_one_of_record() -> None:
    train, val = load_digits_split("train"), load_digits_split("val")
    assert (len(train), len(val)) == (1437, 360)
    assert train.fingerprint() == DIGITS_TRAIN
    assert val.fingerprint() == DIGITS_VAL


def test_digits_split_is_stratified_and_disjoint() -> None:
    train, val = load_digits_split("train"), load_digits_split("val")
    counts = np.bincount(val.labels_N, minlength=10)
    assert counts.min() >= 35
    assert counts.max() <= 37
    seen = {image.tobytes() for image in train.images_NCHW}
    assert not any(image.tobytes() in seen for image in val.images_NCHW)


def test_digits_are_scaled_exactly() -> None:
    values = np.unique(load_digits_split("train").images_NCHW)
    assert values.tolist() == [round(ink * 255 / 16) for ink in range(17)]


def test_synthetic_images_are_those_of_record() -> None:
    assert SyntheticDataset(split="train", num_samples=256, num_classes=8).fingerprint() == SYNTHETIC


def test_synthetic_classes_differ_more_than_their_images() -> None:
    dataset = SyntheticDataset(split="train", num_samples=80, num_classes=8)
    everything = np.arange(80)
    colour = dataset.images(everything).pixels_BCHW.float().mean(dim=(2, 3)).numpy()
    labels = dataset.labels(everything).numpy()
    means = np.stack([colour[labels == label].mean(axis=0) for label in range(8)])
    within = np.mean([colour[labels == label].std(axis=0).mean() for label in range(8)])
    assert means.std(axis=0).mean() > within


def test_impossible_synthetic_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.num_samples is 3 and data\.num_classes is 8"):
        SyntheticDataset(split="train", num_samples=3, num_classes=8)


def test_an_array_with_missing_labels_is_refused() -> None:
    images = np.zeros((4, 1, 2, 2), np.uint8)
    with pytest.raises(ConfigError, match="4 images have 3 labels"):
        ArrayDataset(name="x", version="1", num_classes=1, images_NCHW=images, labels_N=np.zeros(3, np.int64))
    with pytest.raises(ConfigError, match="of float32"):
        ArrayDataset(
            name="x",
            version="1",
            num_classes=1,
            images_NCHW=images.astype(np.float32),  # type: ignore[arg-type]
            labels_N=np.zeros(4, np.int64),
        )


def test_renaming_or_changing_a_pixel_changes_the_fingerprint() -> None:
    images, labels = np.zeros((4, 1, 2, 2), np.uint8), np.zeros(4, np.int64)

    def fingerprint(name: str, pixels: np.ndarray) -> str:
        dataset = ArrayDataset(name=name, version="1", num_classes=1, images_NCHW=pixels, labels_N=labels)
        return dataset.fingerprint()

    changed = images.copy()
    changed[3, 0, 1, 1] = 1
    assert len({fingerprint("a", images), fingerprint("b", images), fingerprint("a", changed)}) == 3
