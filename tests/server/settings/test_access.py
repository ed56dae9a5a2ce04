"""The settings that decide who may use the server are one group of the table."""

import msgspec

from server.settings.access import ACCESS, AccessSettings
from server.settings.table import SETTINGS


def test_they_are_one_group_of_the_table() -> None:
    fields = {field.name for field in msgspec.structs.fields(AccessSettings)}
    assert {name for name, setting in SETTINGS.items() if setting.group == ACCESS} == fields
