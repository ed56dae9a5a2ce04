"""`lightwell serve`. Its flags are those of the table in `server.settings`."""

import argparse
import os

from server.cli.parser import Commands, Parser, fail
from server.settings.load import load_settings
from server.settings.setting import ENV_PREFIX, Setting
from server.settings.table import SETTINGS

MODEL_SYNONYMS = ("--model", "-m", "--model-path")  # as in other servers

EPILOG = f"""\
Each flag can also be set by an environment variable (--max-num-seqs by {ENV_PREFIX}MAX_NUM_SEQS; commas separate the
values of a list) and by a key of the --config file (max-num-seqs: 64). Flags override the environment, and the
environment overrides the file.
"""


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model",
        usage="%(prog)s [MODEL] [FLAGS]",
        description="Serve a model through APIs compatible with OpenAI's, Anthropic's and Ollama's.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    add_settings(parser)


def add_settings(parser: Parser) -> None:
    """Add --config and a flag for each setting, in the groups of the table."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in SETTINGS.values():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        _add_setting(groups[setting.group], setting)


def _add_setting(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """Add a flag that stores its text unparsed: `load_settings` parses the values of all sources alike."""
    text = setting.description + (f" [{setting.default_text}]" if setting.default_text else "")
    text = text.replace("%", "%%") if setting.help else argparse.SUPPRESS
    metavar, unset = setting.value_type.metavar, argparse.SUPPRESS
    if setting.is_switch:
        group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, default=unset, help=text)
    elif setting.positional:
        group.add_argument(setting.name, nargs="?", metavar=metavar, default=unset, help=text)
    else:
        action = "append" if setting.value_type.is_list else "store"
        flags = MODEL_SYNONYMS if setting.name == "models" else (setting.flag,)
        group.add_argument(*flags, dest=setting.name, action=action, metavar=metavar, default=unset, help=text)


def run(arguments: argparse.Namespace) -> int:
    from server.model_paths import ModelError
    from server.processes.child_process import SupervisorError
    from server.supervisor import supervise

    settings = load_settings(vars(arguments), os.environ, arguments.config)
    try:
        return supervise(settings)
    except (ModelError, SupervisorError) as error:
        return fail(str(error))
