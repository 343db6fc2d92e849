"""Options of a command from a dataclass: flags, a YAML file, `--print_config`; a wrong name is told the nearest one."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from alignfast.trainers.refused import option_names, refuse_unknown

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class UsageError(Exception):
    """The command line asks for something that can't be meant; the message says what would do."""


class _Parser(ArgumentParser):
    """One line for an error, where jsonargparse prints all options first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists the options\n")


def parse_options(
    command: str,
    argv: Sequence[str],
    *classes: type,
    positional: Sequence[str] = (),
    description: str | None = None,
) -> list[Any]:
    """Instances of dataclasses whose fields are the options of one command, all on one level.

    Args:
        command: its name, as the user types it.
        argv: what follows it.
        classes: dataclasses; no two share a field.
        positional: fields that are given by place instead of by flag.
        description: text for `--help`.

    Raises:
        SystemExit: 2 for a wrong option or value, 0 after `--help` and `--print_config`.
        ValueError: a dataclass refuses the values.
    """
    parser = _Parser(
        prog=f"alignfast {command}",
        description=description,
        usage=" ".join(
            ["alignfast", command, *map(str.upper, positional), "[--config FILE] [--option value ...]"]
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of options; flags after it win.")
    for cls in classes:
        parser.add_class_arguments(cls, None, skip=set(positional))
    for name in positional:
        parser.add_argument(name)
    known = [name for cls in classes for name in option_names(cls)]
    words = _with_true(argv, classes)
    try:
        refuse_unknown(command, [*known, "config", "print_config", "help"], _given(words))
    except TypeError as error:
        parser.error(str(error))
    parsed = parser.parse_args(words).as_dict()
    return [cls(**{name: parsed[name] for name in option_names(cls)}) for cls in classes]


def _with_true(argv: Sequence[str], classes: Sequence[type]) -> list[str]:
    """A flag that is on or off may stand alone, as TRL's users write it: `--bf16` is `--bf16 true`."""
    switches = {
        f"--{name}"
        for cls in classes
        for name, hint in typing.get_type_hints(cls).items()
        if hint is bool or bool in typing.get_args(hint)
    }
    words = list(argv)
    for at in reversed(range(len(words))):
        if words[at] in switches and (at + 1 == len(words) or words[at + 1].startswith("--")):
            words.insert(at + 1, "true")
    return words


def _given(words: Sequence[str]) -> list[str]:
    """Names of the options on the command line and in the files it names."""
    names, files = [], []
    for at, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, _, value = word[2:].partition("=")
        names.append(name.partition(".")[0])  # --peft.r 8 is a key of a mapping
        if name == "config":
            files.append(value or (words[at + 1] if at + 1 < len(words) else ""))
    for file in files:
        if Path(file).is_file():  # jsonargparse says what is wrong with a file that is not there
            content = yaml.safe_load(Path(file).read_text())
            names += list(content) if isinstance(content, dict) else []
    return names
