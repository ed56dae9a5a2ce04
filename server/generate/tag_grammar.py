"""The grammar of text in which a trigger begins a part of a given form: vLLM's structural tags, in Lark."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.generate.tool_grammar import ANYTHING, Marks
from server.schemas.structured import Structure


def tag_grammar(
    structures: Sequence[Structure],
    triggers: Sequence[str],
    special_ids: Mapping[str, int],
    options: Mapping[str, Any],
) -> str:
    """Any text, but each trigger in it is the beginning of one of the structures.

    Args:
        structures: each begins with a trigger; judged.
        special_ids: triggers and ends that are control tokens -> their token ids.
        options: how llguidance reads schemas.
    """
    marks = Marks(special_ids)
    rules = [
        "%llguidance {}",
        f"start: ({' | '.join(f'part_{index}' for index in range(len(triggers)))})* TEXT",
        f"TEXT: /{ANYTHING}/",
    ]
    for index, trigger in enumerate(triggers):
        forms = [
            f"{json.dumps(structure.begin.removeprefix(trigger))} json_{number} {marks.write(structure.end)}"
            for number, structure in enumerate(structures)
            if trigger_of(structure, triggers) == trigger
        ]
        rules += [f"part_{index}: begin_{index} ({' | '.join(forms)})", marks.up_to(f"begin_{index}", "TEXT", trigger)]
    schemas = ({**structure.schema_, **options} for structure in structures)
    rules += [f"json_{number}: %json {json.dumps(schema)}" for number, schema in enumerate(schemas)]
    return "\n".join(rules) + "\n"


def trigger_of(structure: Structure, triggers: Sequence[str]) -> str | None:
    """The first trigger that it begins with."""
    return next((trigger for trigger in triggers if structure.begin.startswith(trigger)), None)
