"""Reads config files (TOML, JSON or the card of a run), and writes the settings of a job as JSON."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from cifar_dist.errors import UserError
from cifar_dist.options import Section, checked, nearest
from cifar_dist.sealed_json import from_json, is_sealed

CARD_KEYS = {"config", "manifest_sha256", "recipe", "sha256"}  # in the config.json of a run


def to_text(tables: dict[str, dict[str, Any]]) -> str:
    """Returns settings by table as JSON that read_config_file can read."""
    return json.dumps(tables, indent=2)


def read_config_file(path: str, settings: dict[str, tuple[type[Section], dataclasses.Field]]) -> dict[str, Any]:
    """Returns the settings of a TOML or JSON file by name: `name = value`, in tables named by section or in none.

    From the config.json of a run it takes the training settings and the recipe. Raises UserError for other files, and
    for settings that the job does not have.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        values = from_json(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read as TOML or JSON: {error}") from error
    sections = {section.table: section for section, _ in settings.values() if section.table}
    if values.keys() >= CARD_KEYS:
        values = from_card(path, values, {*sections, *({"recipe"} & settings.keys())})
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(value, dict):
            new = from_file(path, settings, {key: value})
        elif key in sections:
            in_section = {name: pair for name, pair in settings.items() if pair[0] is sections[key]}
            new = from_file(path, in_section, value, key)
        else:
            raise UserError(f"--config {path}: unknown table {key!r}{nearest(key, sections)}")
        if twice := found.keys() & new.keys():
            raise UserError(f"--config {path} sets {min(twice)} twice; keep one of the two")
        found |= new
    return found


def from_card(path: str, card: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Returns what a run's card says of the tables and settings that the job has. Raises UserError if that is nothing,
    or if the card was changed."""
    if not is_sealed(card) or not isinstance(card["config"], dict):
        raise UserError(f"--config {path} does not match its own checksum; copy its settings into a file of yours")
    values = {name: value for name, value in {**card["config"], "recipe": card["recipe"]}.items() if name in known}
    if not values:
        raise UserError(f"--config {path} is the card of a run, and this job has no settings of training")
    return values


def from_file(path: str, settings: dict[str, Any], values: dict[str, Any], table: str = "") -> dict[str, Any]:
    """Returns the checked values of one table by setting name."""
    found: dict[str, Any] = {}
    aliases = {alias: name for name, (_, f) in settings.items() for alias in f.metadata["aliases"]}
    for key, value in values.items():
        name = aliases.get(key, key).replace("-", "_")
        if name not in settings:
            where = f" in the table {table!r}" if table else ""
            raise UserError(f"--config {path}: unknown setting {key!r}{where}{nearest(name, settings)}")
        if name in found:
            raise UserError(f"--config {path} sets {name} twice; keep one of the two")
        section, f = settings[name]
        try:
            found[name] = checked(f, value, section.range_words)
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from error
    return found
