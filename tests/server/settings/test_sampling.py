"""The fields of --default-sampling have the names and limits of the fields of requests."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.schemas.generation_request import SamplingFields
from server.settings.load import load_settings
from server.settings.sampling import SAMPLING_FIELDS
from server.settings.setting import SettingsError

BOUNDS = (-2.0, -1.0, 0.0, 0.01, 1.0, 2.0, 10.0, 256.0, 1000.0, 2.0**63)
VALUES: list[Any] = [
    *(near for bound in BOUNDS for near in (math.nextafter(bound, -math.inf), bound, math.nextafter(bound, math.inf))),
    *(whole + step for whole in (-2, -1, 0, 1, 2, 10, 256, 1000, 2**63) for step in (-1, 0, 1)),
    *(math.inf, math.nan, True, [], {}),
]


def test_names() -> None:
    assert SAMPLING_FIELDS.keys() == SamplingFields.model_fields.keys()


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_limits(tmp_path: Path, name: str) -> None:
    """The setting and a request accept the same values."""

    def is_accepted_in_a_request(value: object) -> bool:
        try:
            SamplingFields.model_validate({name: value})
        except ValidationError:
            return False
        return True

    def is_accepted_as_a_setting(value: object) -> bool:
        try:
            SAMPLING_FIELDS[name].parse(value)
        except ValueError:
            return False
        return True

    accepted = [value for value in VALUES if is_accepted_in_a_request(value)]
    assert repr(accepted) == repr([value for value in VALUES if is_accepted_as_a_setting(value)])
    assert 0 < len(accepted) < len(VALUES)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{temprature: 1}", "unknown field 'temprature' (did you mean temperature?)"),
        ("temprature=1", "unknown field 'temprature' (did you mean temperature?)"),
        ("{m: {topk: 4}}", "unknown field 'topk' (did you mean top_k?)"),
        ("{m: temprature=1}", "unknown field 'temprature' (did you mean temperature?)"),
        ("{m: {n: {top_k: 4}}}", "unknown field 'n' (fields: temperature, top_p, "),
        ("{max_tokens: 5}", "unknown field 'max_tokens' (fields: temperature, top_p, "),
        ("temperature=5", "temperature: expected a number from 0 to 2, got 5"),
        ("{temperature: '1'}", "temperature: expected a number from 0 to 2, got '1'"),
        ("{m: {top_k: 1.5}}", "top_k: expected an integer from -1 to 9223372036854775807, got 1.5"),
        ("{samplers: top_k}", "samplers: expected a list, got 'top_k'"),
        ("{typical_p: 0}", "typical_p: expected a number above 0 and up to 1, got 0"),
    ],
)
def test_errors_name_the_source_and_the_field(tmp_path: Path, value: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"default-sampling: {value}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(config=str(file))
    assert str(caught.value).startswith(f"{file}: default-sampling: {message}")
