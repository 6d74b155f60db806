"""Settings of the images: the data set, and what is done to it."""

from __future__ import annotations

from dataclasses import dataclass

from dino_exp.config.fields import Section, setting


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What all data sets have: the sizes of their crops, and a place where they lie."""

    name: str = setting(choices=("digits", "synthetic"), help="which data set")
    root: str | None = setting(
        role="runtime", legacy=None, pattern=r".+", help="folder of the data's files; null where it has none"
    )
    cache: bool = setting(
        role="runtime", legacy=False, help="decode images of files once, into a file below paths.cache"
    )
    download: bool = setting(
        role="runtime", legacy=False, help="fetch what is not in data.root from its authors (cifar10, cifar100)"
    )
    image_size: int = setting(minimum=1, help="side of a global crop, pixels")
    local_size: int = setting(minimum=1, help="side of a local crop, pixels")
    patch_size: int = setting(minimum=1, help="side of a patch, pixels; divides both crop sizes")


@dataclass(frozen=True, kw_only=True)
class ReadyDataConfig(DataConfig):
    """Data that is there without a download."""

    name: str = setting(choices=("digits", "synthetic"), help="digits: scikit-learn's; synthetic: made, colour")
    num_samples: int | None = setting(minimum=1, help="training images to make (synthetic only)")
    num_classes: int | None = setting(minimum=2, help="classes to make (synthetic only)")


@dataclass(frozen=True, kw_only=True)
class CifarDataConfig(DataConfig):
    """CIFAR-10 or CIFAR-100, from the archive of their authors in `data.root`, or its extracted folder (data.md)."""

    name: str = setting(choices=("cifar10", "cifar100"), help="which of the two: 10 or 100 classes")


@dataclass(frozen=True, kw_only=True)
class FilesDataConfig(DataConfig):
    """Images in files, in any tree of folders; where they lie is no part of a run's identity, what they are is."""

    name: str = setting(
        choices=("folder", "imagenet"), help="folder: any tree of images; imagenet: train/ and val/ of class folders"
    )
    digest: str | None = setting(
        legacy=None, pattern=r"sha256:[0-9a-f]{64}", help="digest of the listing of data.root; set by data.root="
    )
    decode_size: int = setting(
        minimum=16, maximum=8192, help="side that no decoded image exceeds: larger ones are reduced; pixels"
    )
    labels: str = setting(
        choices=("auto", "folders", "none"), help="whether first-level folders are classes; auto: if that can be"
    )
    val_share: float = setting(
        above=0, maximum=0.9, help="share held out by a hash of each path, where there is no train/ and val/"
    )
    unreadable: str = setting(
        choices=("refuse", "skip"), help="images that cannot be decoded: stop at the first, or check all and leave out"
    )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    """What both augmentations have: the crops."""

    name: str = setting(choices=("digits", "dino"), help="which augmentation")
    num_local_crops: int = setting(minimum=0, help="local crops of an image, beside its two global ones")
    global_area: tuple[float, float] = setting(
        above=0, maximum=1, increasing=True, help="area of a global crop, share of the image"
    )
    local_area: tuple[float, float] = setting(
        above=0, maximum=1, increasing=True, help="area of a local crop, share of the image"
    )
    ratio: tuple[float, float] = setting(above=0, increasing=True, help="width over height of a crop")


@dataclass(frozen=True, kw_only=True)
class DigitsAugmentConfig(AugmentConfig):
    """Gentle distortions for digits: never flipped."""

    name: str = setting(choices=("digits",), help="which augmentation")
    max_rotation_degrees: float = setting(minimum=0, maximum=180, help="rotation either way, degrees")
    blur_probability: float = setting(minimum=0, maximum=1, help="share of crops that are blurred")
    max_gain: float = setting(minimum=0, maximum=1, help="contrast change either way, share")
    noise_std: float = setting(minimum=0, help="Gaussian noise, in units of full ink")


@dataclass(frozen=True, kw_only=True)
class DinoAugmentConfig(AugmentConfig):
    """The paper's augmentation (Caron et al. 2021, after BYOL); needs colour images."""

    name: str = setting(choices=("dino",), help="which augmentation")
    flip_probability: float = setting(minimum=0, maximum=1, help="horizontal flip")
    jitter_probability: float = setting(minimum=0, maximum=1, help="colour jitter")
    brightness: float = setting(minimum=0, help="jitter strength")
    contrast: float = setting(minimum=0, help="jitter strength")
    saturation: float = setting(minimum=0, help="jitter strength")
    hue: float = setting(minimum=0, maximum=0.5, help="jitter strength, turns of the colour circle")
    grey_probability: float = setting(minimum=0, maximum=1, help="conversion to grey")
    blur_probabilities: tuple[float, float, float] = setting(
        minimum=0, maximum=1, help="Gaussian blur of the first global, second global and local crops"
    )
    blur_radius: tuple[float, float] = setting(above=0, increasing=True, help="standard deviation, pixels")
    solarise_probability: float = setting(minimum=0, maximum=1, help="solarisation of the second global crop")


AnyDataConfig = ReadyDataConfig | CifarDataConfig | FilesDataConfig
AnyAugmentConfig = DigitsAugmentConfig | DinoAugmentConfig
