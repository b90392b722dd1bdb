"""The settings of training as options of a benchmark."""

from argparse import Namespace
from typing import Any

from cifar_dist.cli.train import TRAINING
from cifar_dist.command_line import Parser, add_option
from cifar_dist.config import option_fields


def add_training_options(parser: Parser) -> None:
    groups = {section.table: parser.add_argument_group(section.heading) for section in TRAINING}
    sections = {section.table: section for section in TRAINING}
    for table, f in option_fields().values():
        add_option(groups[table], sections[table], f, default=f.default, is_shown=True)


def given_settings(args: Namespace) -> dict[str, Any]:
    """The settings that the command line gave, by name."""
    return {name: value for name in option_fields() if (value := getattr(args, name)) is not None}
