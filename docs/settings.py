"""Writes docs/settings.md from the declarations of the settings: make settings."""

import textwrap
from dataclasses import MISSING, Field
from pathlib import Path

from cifar_dist.cli import JOBS, module_of
from cifar_dist.command_line import Command
from cifar_dist.options import Section, flag_of, kind_of

HEAD = """# Settings

Every setting of every job, as `--help-all` shows it. This page is generated: `make settings`.

Settings come from three places. The command line wins over the file of `--config`, and that file
wins over the recipe. A config file is TOML or JSON:

```toml
recipe = "deck_fan"

[launch]
workers = "1:4"

[loop]
epochs = 10
seed = 7
```

The table is the name in parentheses below. A setting may also stand outside of any table.
`--print-config` prints all settings of a job as JSON, which `--config` reads. The `config.json` of
a run is a config file too: it gives the run's training settings and its recipe.
"""


def number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def entry(f: Field, section_jobs: list[str], commands: dict[str, Command]) -> str:
    """One setting as a list item of at most 100 columns."""
    kind, is_optional, is_list = kind_of(f)
    values = "|".join(f.metadata["choices"]) or f.metadata["metavar"] or {bool: "BOOL"}.get(kind, kind.__name__.upper())
    facts = (
        [f"default `{' '.join(f.default) if is_list else f.default}`"] if f.default not in (MISSING, None, "") else []
    )
    jobs = [name for name in section_jobs if f.name in commands[name].settings()]
    required = [name for name in jobs if f.name in commands[name].required()]
    facts += [f"only in {listed(jobs)}"] * (jobs != section_jobs)
    facts += ["required" if required == jobs else f"required in {listed(required)}"] * bool(required)
    facts += [
        f"default in {listed([name])}: `{c.defaults[f.name]}`" for name, c in commands.items() if f.name in c.defaults
    ]
    facts += ["none by default"] * (is_optional and f.default is None)
    low, high = f.metadata["minimum"], f.metadata["maximum"]
    if low is not None:
        facts.append(f"{number(low)} or more" if high is None else f"from {number(low)} to {number(high)}")
    facts += ["one or more values"] * is_list + ["may change when a run is resumed"] * f.metadata["may_change"]
    facts += [f"also `--{alias}`" for alias in f.metadata["aliases"]]
    text = f"- `{flag_of(f.name)} {values}`: {f.metadata['help']}" + (f" ({', '.join(facts)})" if facts else "")
    words = textwrap.wrap(text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(words)


def listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def page() -> str:
    commands = {name: module_of(name).COMMAND for name in JOBS}
    sections: dict[type[Section], None] = dict.fromkeys(s for c in commands.values() for s in c.sections)
    parts = [HEAD]
    for section in sections:
        fields = {n: f for c in commands.values() for n, (s, f) in c.settings().items() if s is section}
        jobs = [name for name, command in commands.items() if section in command.sections]
        lines = "\n".join(entry(f, jobs, commands) for f in fields.values())
        parts.append(f"## {section.heading.capitalize()} ({section.table})\n\nJobs: {listed(jobs)}.\n\n{lines}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
