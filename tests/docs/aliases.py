"""The table of aliases in the documentation."""

from server.parts.hub.names import MODEL_ALIASES, families
from server.parts.hub.packages import PACKAGE_ALIASES


def markdown_table() -> str:
    """Return a table of the families, with the model of each tag."""
    lines = ["| Family | Tags and their models on Hugging Face |", "|---|---|"]
    for family, tags in families().items():
        models = [f"`{tag}`: `{MODEL_ALIASES[f'{family}:{tag}'].source}`" for tag in tags]
        lines.append(f"| `{family}` | {'<br>'.join(models)} |")
    packages = [f"`{name}` ({alias.license.partition(':')[0]})" for name, alias in PACKAGE_ALIASES.items()]
    return "\n".join([*lines, "", f"From PyPI: {', '.join(packages)}."]) + "\n"
