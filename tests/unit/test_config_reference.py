from pathlib import Path

from dino_exp.config.check import known_keys
from dino_exp.config.evaluate import EvaluateConfig
from dino_exp.config.reference import settings_reference

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_settings_table_is_up_to_date():
    assert DOCS.read_text(encoding="utf-8") == settings_reference(), (
        "run `python -m dino_exp.config.reference docs/settings.md`"
    )


def test_every_setting_is_explained():
    text = settings_reference()
    assert [key for key in (*known_keys(), *known_keys(EvaluateConfig)) if f"| `{key}` |" not in text] == []
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(line.replace("\\|", "").count("|") == 6 and not line.endswith("|  |") for line in rows)
