import pathlib

import gin
import pytest

from t5style.models.config import TransformerConfig
from t5style.models.presets import PRESETS

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "gin" / "models"


@pytest.mark.parametrize("name", PRESETS)
def test_gin_file_is_the_preset(name):
    seen = []
    with gin.unlock_config():
        gin.clear_config(clear_constants=True)
        try:
            gin.parse_config_file(str(FOLDER / f"{name}.gin"))
            seen.append(gin.query_parameter("MODEL/gin.macro.value").scoped_configurable_fn())
        finally:
            gin.clear_config(clear_constants=True)
    assert isinstance(seen[0], TransformerConfig)
    assert seen[0] == PRESETS[name]()


def test_every_gin_file_has_its_preset_and_sets_no_run_macro():
    assert {path.stem for path in FOLDER.glob("*.gin")} == set(PRESETS)
    for path in FOLDER.glob("*.gin"):
        lines = path.read_text().splitlines()
        macros = [line.split("=")[0].strip() for line in lines if line[:1].isupper()]
        assert macros == ["MODEL"], path
