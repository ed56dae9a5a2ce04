"""Anthropic's tools that the client runs. Requests name only their type: the model must be told the schema."""

from collections.abc import Mapping, Sequence
from typing import Any

_FIELDS: Mapping[str, Any] = {
    "path": {"type": "string", "description": "Path of the file or directory."},
    "file_text": {"type": "string", "description": "With create: content of the new file."},
    "old_str": {"type": "string", "description": "With str_replace: text to replace, which must occur exactly once."},
    "new_str": {"type": "string", "description": "With str_replace: the new text."},
    "insert_line": {"type": "integer", "description": "With insert: number of the line after which to insert."},
    "insert_text": {"type": "string", "description": "With insert: the text to insert."},
    "view_range": {
        "type": "array",
        "items": {"type": "integer"},
        "description": "With view: first and last line to show; -1: the end of the file.",
    },
    "old_path": {"type": "string", "description": "With rename: the present path."},
    "new_path": {"type": "string", "description": "With rename: the new path."},
}
_EDITOR_FIELDS = ("path", "file_text", "old_str", "new_str", "insert_line", "insert_text", "view_range")
_EDITOR_COMMANDS = ("view", "create", "str_replace", "insert")


def _file_schema(commands: Sequence[str], fields: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    properties = {"command": {"type": "string", "enum": list(commands)}} | {name: _FIELDS[name] for name in fields}
    return {"type": "object", "properties": properties, "required": list(required)}


_BASH = (
    "Runs a command in a bash shell that keeps its state between calls.",
    {
        "type": "object",
        "properties": {
            "command": {"type": "string", "description": "The command to run."},
            "restart": {"type": "boolean", "description": "True: restart the shell instead."},
        },
    },
)
_EDITOR = ("Views, creates and edits text files.", _file_schema(_EDITOR_COMMANDS, _EDITOR_FIELDS, ("command", "path")))
_MEMORY = (
    "Views and edits the files below /memories, which are kept between conversations.",
    _file_schema((*_EDITOR_COMMANDS, "delete", "rename"), tuple(_FIELDS), ("command",)),
)
# Type of a tool -> its description and the JSON schema of its input.
CLIENT_TOOLS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bash_20241022": _BASH,
    "bash_20250124": _BASH,
    "text_editor_20250429": _EDITOR,
    "text_editor_20250728": _EDITOR,
    "memory_20250818": _MEMORY,
}
