"""The handwritten digits that come with scikit-learn: 1,797 grey images of 8x8 pixels, no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI), the test part.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from dino_exp.data.datasets import ArrayDataset

NUM_CLASSES = 10
NUM_VAL = 360
_MAX_INK = 16  # the files count set pixels in 4x4 blocks of a 32x32 bitmap


def load_digits_split(split: Literal["train", "val"]) -> ArrayDataset:
    """1,437 images to train on or 360 held out: stratified by class, always the same images.

    Images are (1, 8, 8) uint8 from 0 (paper) to 255 (ink).
    """
    # Imported here because scikit-learn takes longer to import than the rest of this package together.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    ink_ND, labels_N = load_digits(return_X_y=True)
    everything = np.arange(len(labels_N))
    train, val = train_test_split(everything, test_size=NUM_VAL, random_state=0, stratify=labels_N)
    chosen = train if split == "train" else val
    pixels = np.rint(ink_ND[chosen] * (255 / _MAX_INK)).astype(np.uint8)
    return ArrayDataset(
        name=f"digits/{split}",
        version="1",
        num_classes=NUM_CLASSES,
        images_NCHW=pixels.reshape(-1, 1, 8, 8),
        labels_N=labels_N[chosen].astype(np.int64),
    )
