"""`lightwell pull`, `lightwell list` and `lightwell rm`: the models on this machine."""

import argparse

from server.cli.parser import Commands, fail
from server.settings.table import SETTINGS


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "pull",
        help="download a model and print its path",
        description="Download a model, unless it is already there, and print its path. Says before whether it fits on "
        "the disk and in memory. A download that was interrupted continues; hashes are checked.",
    )
    parser.set_defaults(run=_pull)
    parser.add_argument("model", metavar="MODEL", help=SETTINGS["model"].description)
    parser = commands.add_parser(
        "list",
        help="list the models on this machine",
        description="List the aliases, and the models that have been downloaded, with size and place.",
    )
    parser.set_defaults(run=_list)
    parser.add_argument("--json", action="store_true", help="Print the list as JSON")
    parser = commands.add_parser(
        "rm",
        help="remove a downloaded model",
        description="Remove a downloaded model. Other programs that share the cache of Hugging Face lose it too.",
    )
    parser.set_defaults(run=_remove)
    parser.add_argument("model", metavar="MODEL", help="Name of the model, as `lightwell list` shows it")


def _pull(arguments: argparse.Namespace) -> int:
    from server.model_paths import ModelError, resolve_model

    try:
        print(resolve_model(arguments.model, shows_progress=True).path)
    except ModelError as error:
        return fail(str(error))
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    from server.format import format_bytes
    from server.model_paths import ModelError
    from server.parts.hub.models import remove_model

    try:
        print(f"Removed {arguments.model}, {format_bytes(remove_model(arguments.model))}")
    except ModelError as error:
        return fail(str(error))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from server.parts.hub.models import print_models

    return print_models(as_json=arguments.json)
