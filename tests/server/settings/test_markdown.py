"""The Markdown table of settings."""

from typing import Any

import pytest

from server.settings.markdown import markdown_table
from server.settings.table import SETTINGS
from tests.support.paths import ROOT


def test_the_documentation_has_the_table() -> None:
    document = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    between = document.partition("<!-- settings:begin -->")[2].partition("<!-- settings:end -->")[0]
    assert between.strip() == markdown_table().strip(), "run `python -m tests.docs.generate`"


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_table_names_every_setting(setting: Any) -> None:
    assert f"`{setting.flag}`" in markdown_table()
