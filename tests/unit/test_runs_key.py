import pytest

from dino_exp.errors import ConfigError, RefusedError
from dino_exp.runs.key import RunKey, choose_name, parse_run_key

CONFIG, CODE = "c1:" + "0123456789abcdef" * 4, "fedcba9876543210" * 4
KEY = RunKey(model="vit_nano", config_hash=CONFIG, code_id=CODE)


def test_text_is_model_config_code_and_variant():
    assert KEY.text() == "vit_nano-01234567-fedcba98"
    assert (
        RunKey(model="vit_s", config_hash=CONFIG, code_id=CODE, variant="lr-3").text() == "vit_s-01234567-fedcba98-lr-3"
    )
    assert KEY.text(16) == "vit_nano-0123456789abcdef-fedcba9876543210"


@pytest.mark.parametrize("variant", [None, "a", "a-b", "0123abcd-89abcdef", "best.of_3", "x" * 64])
@pytest.mark.parametrize("digits", [8, 16, 64])
def test_what_was_written_reads_back_in_one_way(variant, digits):
    key = RunKey(model="vit_nano", config_hash=CONFIG, code_id=CODE, variant=variant)
    name = parse_run_key(key.text(digits))
    assert name is not None
    assert (name.model, name.variant) == ("vit_nano", variant)
    assert (name.config_digits, name.code_digits) == (CONFIG[3:][:digits], CODE[:digits])


@pytest.mark.parametrize(
    "text",
    ["", "vit", "vit_nano-01234567", "old-vit_nano-01234567-fedcba98/", "vit_nano-01234567-fedcba98.bak",
     "vit_nano-01234567-fedcba98-", "vit_nano-01234567-fedcba9876543210", "vit_nano-0123456G-fedcba98",
     "vit_nano-01234567-fedcba98\n", "../vit_nano-01234567-fedcba98", "vit_nano-01234567-FEDCBA98"],
)  # fmt: skip
def test_other_names_are_no_run_keys(text):
    assert parse_run_key(text) is None


@pytest.mark.parametrize(
    "wrong",
    [{"model": "vit-s"}, {"model": ""}, {"model": "../x"}, {"config_hash": CODE}, {"config_hash": "c1:12"},
     {"code_id": "dirty"}, {"variant": ""}, {"variant": "-a"}, {"variant": "a-"}, {"variant": "a/b"},
     {"variant": ".."}, {"variant": "a b"}, {"variant": "x" * 65}, {"variant": "a\n"}, {"variant": "a@best"}],
)  # fmt: skip
def test_an_impossible_key_cannot_exist(wrong):
    with pytest.raises(ConfigError, match="expected"):
        RunKey(**({"model": "vit_s", "config_hash": CONFIG, "code_id": CODE} | wrong))


def test_a_clash_of_prefixes_lengthens_the_name():
    other = (CONFIG[:11] + "f" * 56, CODE)
    taken = {KEY.text(): other}
    assert choose_name(KEY, taken.get) == KEY.text(16)
    taken[KEY.text(16)] = (CONFIG, CODE)
    assert choose_name(KEY, taken.get) == KEY.text(16)


def test_a_run_keeps_its_longer_name_after_the_other_run_has_gone():
    assert choose_name(KEY, {KEY.text(16): (CONFIG, CODE)}.get) == KEY.text(16)


def test_a_true_clash_is_refused_and_says_how_to_keep_both():
    with pytest.raises(RefusedError, match=r"run\.variant"):
        choose_name(KEY, lambda name: ("c2:" + CONFIG[3:], CODE))
