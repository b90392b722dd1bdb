"""Builds a job's command line from its sections of settings. This module knows no particular setting."""

import argparse
import dataclasses
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from cifar_dist.config_file import read_config_file, to_text
from cifar_dist.options import Section, checked, flag_of, kind_of, nearest

TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")
WIDTH = 100  # of the help, in characters


def parse_bool(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in TRUE


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that suggests the nearest valid option or value."""

    def __init__(self, **settings: Any) -> None:
        formatter = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=WIDTH)  # noqa: E731
        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)
        self._negative_number_matcher = re.compile(r"-\d")  # -1..1 and -1e-3 are values, not options
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        result, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            word = unknown[0].split("=")[0]
            self.error(f"unknown option {unknown[0]}{nearest(word, options)}; --help-all lists them all")
        return result

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = nearest(value, action.choices)
            raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(action.choices)}{hint}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


@dataclass(frozen=True, kw_only=True)
class Given:
    """The values that the user gave, by setting. The command line overrides the config file."""

    values: Mapping[str, Any]

    def of(self, section: type[Section]) -> dict[str, Any]:
        """Returns the given values of a section."""
        names = {f.name for f in dataclasses.fields(section)}  # type: ignore[arg-type]
        return {name: value for name, value in self.values.items() if name in names}

    def build(self, section: type, **others: Any) -> Any:
        """Builds the section from the given values and from `others`, which the job sets. Raises UserError."""
        return section(**{**self.of(section), **others})


def no_recipe(_given: Given) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A job on the command line.

    `without`: settings of its sections that the job sets itself. `defaults`: the job's defaults that differ from the
    sections'. `guide`: text between description and options in the help. `recipe_settings` returns a recipe's
    training settings, for --print-config.
    """

    description: str
    sections: tuple[type[Section], ...]
    examples: str
    guide: str = ""
    without: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    recipe_settings: Callable[[Given], dict[str, Any]] = no_recipe

    def settings(self) -> dict[str, tuple[type[Section], dataclasses.Field]]:
        """Returns name -> (section, field) of each setting. Within a section, required settings come first."""
        found: dict[str, tuple[type[Section], dataclasses.Field]] = {}
        for section in self.sections:
            fields = [f for f in dataclasses.fields(section) if f.name not in self.without]  # type: ignore[arg-type]
            for f in sorted(fields, key=lambda f: f.default is not dataclasses.MISSING):
                found.setdefault(f.name, (section, f))
        return found

    def required(self) -> list[str]:
        settings = self.settings().items()
        return [n for n, (_, f) in settings if f.default is dataclasses.MISSING and n not in self.defaults]

    def parser(self, prog: str, show_all: bool = True) -> Parser:
        """Returns the parser. Its help shows all settings, or only the common ones."""
        settings = self.settings()
        needed = [f"{flag_of(n)} {settings[n][1].metadata['metavar'] or 'VALUE'}" for n in self.required()]
        text = "\n\n".join(filter(None, [textwrap.fill(self.description, WIDTH), self.guide.rstrip()]))
        more = f"\n{prog} --help-all shows every option." * (not show_all)
        usage = " ".join([prog, *needed, "[options]"])
        parser = Parser(prog=prog, usage=usage, description=text, epilog=self.examples + more, add_help=False)
        parser.add_argument("--help", "-h", action="store_true", help="show what most people need")
        parser.add_argument("--help-all", action="store_true", help="show every option")
        parser.add_argument("--config", metavar="FILE", help="take settings from a TOML or JSON file, or a run's card")
        parser.add_argument("--print-config", action="store_true", help="print all settings as JSON, run nothing")
        groups = {section: parser.add_argument_group(section.heading) for section in self.sections}
        for name, (section, f) in settings.items():
            default = self.defaults.get(name, f.default)
            if section.by_recipe and not show_all:  # a recipe has another default for nearly each of these
                default = None
            add_option(groups[section], section, f, default=default, is_shown=show_all or f.metadata["common"])
        return parser

    def parse(self, words: list[str], prog: str) -> Given:
        """Parses the arguments `words`. For --help, --help-all and --print-config, prints and ends the process.

        Raises SystemExit with code 2 for wrong arguments, UserError for a wrong config file.
        """
        parser = self.parser(prog)
        args = vars(parser.parse_args(words))
        if args["help"] or args["help_all"]:
            print(self.parser(prog, show_all=args["help_all"]).format_help(), end="")
            sys.exit(0)
        settings = self.settings()
        given = {name: args[name] for name in settings if args[name] is not None}
        if args["config"] is not None:
            given = read_config_file(args["config"], settings) | given
        result = Given(values={**self.defaults, **given})
        if args["print_config"]:
            print(to_text(self.tables(result)))
            sys.exit(0)
        if missing := [flag_of(name) for name in self.required() if name not in given]:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
        return result

    def tables(self, given: Given) -> dict[str, dict[str, Any]]:
        """Returns all settings that have a value, by section. Raises UserError for values that the job would refuse."""
        by_recipe, tables = self.recipe_settings(given), dict[str, dict[str, Any]]()
        for section in self.sections:
            given.build(section, **{n: v for n, v in stand_ins(section).items() if n not in given.values})
        for name, (section, f) in self.settings().items():
            value = given.values.get(name, by_recipe.get(name, None if section.by_recipe else f.default))
            if value is not None and value is not dataclasses.MISSING:
                tables.setdefault(section.table, {})[name] = checked(f, value, section.range_words)
        return tables


def stand_ins(section: type[Section]) -> dict[str, Any]:
    """Returns a valid value for each required setting of a section."""
    required = [f for f in dataclasses.fields(section) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    values = {f.name: (f.metadata["choices"] or ("x",))[0] for f in required}
    return {f.name: (values[f.name],) if kind_of(f)[2] else values[f.name] for f in required}


def add_option(group: Any, section: type[Section], f: dataclasses.Field, *, default: Any, is_shown: bool) -> None:
    """Adds `--NAME`, and its aliases and `--SECTION.NAME` without help."""
    (kind, _, is_list), choices, parse = kind_of(f), f.metadata["choices"], f.metadata["parse"]

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    arguments: dict[str, Any] = {
        "type": parsed if parse else kind,
        "choices": choices or None,
        "nargs": "+" * is_list or None,
    }
    arguments["metavar"] = "|".join(choices) if choices and not is_list else f.metadata["metavar"] or "VALUE"
    if kind is bool:
        arguments = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    flag, dotted = flag_of(f.name), f"--{section.table}."
    text = f"{f.metadata['help']}{default_text(default)}".replace("%", "%%")
    group.add_argument(flag, dest=f.name, default=None, help=text if is_shown else argparse.SUPPRESS, **arguments)
    names = [flag.removeprefix("--"), f.name, *f.metadata["aliases"]]
    others = {f"--{alias}": None for alias in f.metadata["aliases"]}
    others |= {dotted + name: None for name in names if section.table}
    if others:
        group.add_argument(*others, dest=f.name, default=None, help=argparse.SUPPRESS, **arguments)


def default_text(default: Any) -> str:
    if default in (dataclasses.MISSING, None, ""):
        return ""
    return f" (default {' '.join(default) if isinstance(default, tuple) else default})"
