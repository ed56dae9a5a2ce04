"""The number of pydantic's errors about a field does not grow with its value: each takes the event loop's time."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from server.api.inspection.inspect import InspectRequest
from tests.server.api.contract import ACTING

HARD_VALUES: Mapping[str, Callable[[int], Any]] = {
    "object of arrays": lambda n: {f"key{number}": [] for number in range(n)},
    "object of numbers": lambda n: dict.fromkeys(map(str, range(n)), 1),
    "arrays": lambda n: [[] for _ in range(n)],
    "objects": lambda n: [{} for _ in range(n)],
    "numbers": lambda n: [-1] * n,
    "strings": lambda n: [""] * n,
}
ACTING_MODELS = {model for model, *_ in ACTING.values()}
MODELS = sorted(ACTING_MODELS | {InspectRequest}, key=lambda model: model.__name__)


@pytest.mark.parametrize("model", MODELS)
def test_a_longer_value_makes_no_more_errors(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        for kind, value in HARD_VALUES.items():
            counts = [num_errors(model, {field.alias or name: value(n)}) for n in (500, 1000)]
            assert counts[0] == counts[1], (name, kind)


def num_errors(model: type[BaseModel], body: dict[str, Any]) -> int:
    try:
        model.model_validate(body)
    except ValidationError as error:
        return error.error_count()
    return 0
