"""The table of settings."""

from server.settings.setting import Setting
from server.settings.table import OTHER_VARIABLES, SETTINGS


def markdown_table() -> str:
    """Return one Markdown table per group of settings, and one of the other environment variables."""
    lines = []
    for group in dict.fromkeys(setting.group for setting in SETTINGS.values()):
        lines += [f"| {group} | default | |", "|---|---|---|"]
        lines += [_row(setting) for setting in SETTINGS.values() if setting.group == group]
        lines.append("")
    lines += ["| Other variables | |", "|---|---|"]
    lines += [f"| `{name}` | {description} |" for name, description in OTHER_VARIABLES.items()]
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    flag = f"`{setting.flag}`" + (f", `--no-{setting.key}`" if setting.default is True else "")
    default = f"`{setting.default_text}`" if setting.default_text else ""
    return f"| {flag} | {default} | {setting.description} |".replace("*", "\\*")
