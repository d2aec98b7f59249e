"""The command line of `python -m engine.server`: flags over the environment over a config file over defaults.

Nothing heavy is imported before the flags are read: `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, add_engine_args, config_from_args, read_environment, unknown_option
from engine.errors import InvalidConfig
from server.config import ServerConfig, add_server_args, server_config
from server.logs import setup_logging

log = logging.getLogger(__name__)
_SECRET = {"api_key", "admin_api_key", "clients"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop. Returns the exit status: 0 stopped, 1 failed, 2 wrong usage or set-up."""
    parser = make_parser()
    read_environment(parser)
    try:
        args = parse_args(parser, sys.argv[1:] if argv is None else argv)
        engine_config, config = config_from_args(args), server_config(vars(args))
        config.check_exposure()
    except InvalidConfig as error:
        parser.error(str(error))
    setup_logging(config.log_format, config.log_level)
    log.info("non-default arguments: %s", non_default(engine_config, config))
    from server.run import serve  # aiohttp is loaded from here on, torch with the model

    return serve(engine_config, config)


def make_parser() -> argparse.ArgumentParser:
    """Every flag of the engine and of the server."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.server",
        usage="%(prog)s [MODEL] [flags]    (--help lists them)",
        description="Serve a model over the OpenAI API.",
        epilog="Flags may also stand in the environment, $SLUICE_PORT for --port, and in a YAML file under the same names, see "
        "--config. The command line wins, then the environment.",
        allow_abbrev=False,
    )
    parser.add_argument("model_tag", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="same as --model")
    parser.add_argument("--config", metavar="FILE.yaml", help="read flags from this file")
    add_engine_args(parser)
    add_server_args(parser)
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `argv` over those of its config file. Raises InvalidConfig, or exits as argparse does."""
    args = _parse(parser, argv)
    if args.config is not None:
        file_args = _parse(parser, file_argv(parser, Path(args.config)))
        args = argparse.Namespace(**vars(file_args) | vars(args))
    if "model_tag" in args:
        if "model" in args and args.model != args.model_tag and "--model" in argv:
            raise InvalidConfig("give the model once: either as the argument or as --model")
        args.model = args.model_tag
    return args


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    args, rest = parser.parse_known_args(argv)
    if rest:
        known = {action.dest for action in parser._actions}
        raise InvalidConfig(unknown_option(rest[0].partition("=")[0].lstrip("-"), known))
    return args


def file_argv(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The entries of a YAML file as command-line words, so that both are read by the same rules."""
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidConfig(f"--config {path}: {error}") from None
    if not isinstance(entries, dict):
        raise InvalidConfig(f"--config {path}: expected lines of the form `name: value`")
    actions = {
        action.dest: action for action in parser._actions if action.option_strings and action.dest not in ("help", "config")
    }
    words: list[str] = []
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise InvalidConfig(f"--config {path}: {unknown_option(str(key), set(actions))}")
        words += _words(actions[name], value)
    return words


def _words(action: argparse.Action, value: Any) -> list[str]:
    option = action.option_strings[0]
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise InvalidConfig(f"{action.dest} must be true or false, got {value!r}")
        return [option if value else option.replace("--", "--no-", 1)]
    if isinstance(value, dict | bool):
        raise InvalidConfig(f"{action.dest}: expected a text or a number, got {value!r}")
    items = [str(item) for item in (value if isinstance(value, list) else [value])]
    if action.nargs == "+":
        return [option, *items]
    if len(items) > 1 and not isinstance(action, argparse._AppendAction):
        raise InvalidConfig(f"{action.dest} takes one value, got {len(items)}")
    return [f"{option}={item}" for item in items]


def non_default(*configs: EngineConfig | ServerConfig) -> dict[str, Any]:
    """What differs from the defaults, keys hidden."""
    return {
        spec.name: "***" if spec.name in _SECRET else value
        for config in configs
        for spec in fields(config)
        if (value := getattr(config, spec.name)) != spec.default
    }
