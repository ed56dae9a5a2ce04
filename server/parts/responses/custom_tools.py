"""Tools that are no functions: the model sees functions in their place, since that is what chat templates show."""

from typing import Any

import msgspec

CUSTOM_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
# Type of a call of a tool that is no function -> the name of the function that it stands for (None: that in the item),
# and the field with the arguments.
OTHER_CALLS: dict[str, tuple[str | None, str]] = {
    "custom_tool_call": (None, "input"),
    "local_shell_call": ("local_shell", "action"),
    "shell_call": ("shell", "action"),
    "apply_patch_call": ("apply_patch", "operation"),
}


def as_function_item(value: Any) -> Any:
    """Return calls of tools that are no functions, and their outputs, as those of functions; name the type of others.

    Without a type, an object with only an id is a reference, and any other is a message.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str | None):
        return value
    if kind is None:
        return value | {"type": "item_reference" if value.keys() - {"type"} == {"id"} else "message"}
    if kind in OTHER_CALLS:
        return _function_call(value, *OTHER_CALLS[kind])
    return _function_output(value) if kind.removesuffix("_output") in OTHER_CALLS else value


def _function_call(item: dict[str, Any], name: str | None, field: str) -> dict[str, Any]:
    arguments = {field: item[field]} if isinstance(item.get(field), str) else item.get(field)
    if not isinstance(arguments, dict):
        raise ValueError(f"expected '{field}' in an item of type '{item['type']}'.")
    text = msgspec.json.encode(arguments).decode()
    return _identified(item, leave_out=field) | {
        "type": "function_call",
        "name": name or item.get("name"),
        "arguments": text,
    }


def _function_output(item: dict[str, Any]) -> dict[str, Any]:
    """Return the output of a call; the shell's, which is split by stream, as JSON text."""
    output = item.get("output", item.get("status"))  # applying a patch may have no output
    if item["type"] == "shell_call_output":
        output = msgspec.json.encode(output).decode()
    return _identified(item, leave_out="output") | {"type": "function_call_output", "output": output}


def _identified(item: dict[str, Any], *, leave_out: str) -> dict[str, Any]:
    """Return the other fields of an item. Items of the local shell may have an `id` as their only `call_id`."""
    rest = {key: value for key, value in item.items() if key not in (leave_out, "status")}
    return rest | {"call_id": item["id"]} if rest.get("call_id") is None and "id" in rest else rest


def custom_input(arguments: str) -> str:
    """Return the input of a custom tool from the arguments of the function; those as they are if they are cut off."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, str])["input"]
    except (msgspec.DecodeError, KeyError):
        return arguments
