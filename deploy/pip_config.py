"""Write pip's configuration on this machine to one pip.conf, and print the local paths in it: `pip_config.py FILE`.

`test-image.sh` runs this, because what pip needs here (certificates, a folder of wheels, another index) it also needs
in the build of the image.
"""

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def read_config() -> configparser.RawConfigParser:
    """Merge all sources of `pip config list`; environment variables override files."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    config = configparser.RawConfigParser()
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        key, value = line.split("=", 1)
        section, name = key.rsplit(".", 1)
        section = "global" if section == ":env:" else section
        if not config.has_section(section):
            config.add_section(section)
        config.set(section, name, ast.literal_eval(value))
    return config


def local_paths(config: configparser.RawConfigParser) -> Iterator[str]:
    """Return the existing absolute paths among the values, sorted."""
    values = [value for section in config.sections() for _, value in config.items(section)]
    words = {word for value in values for word in value.split()}
    return (word for word in sorted(words) if word.startswith("/") and Path(word).exists())


def main(path: str) -> None:
    config = read_config()
    with Path(path).open("w", encoding="utf-8") as file:
        config.write(file)
    print(*local_paths(config), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
