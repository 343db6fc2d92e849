"""A hook that takes what must not be stored out of texts, before they are.

    redact(text) -> text        of a prompt, each of its messages' texts, an answer, a comment, an edit

Tokens and log-probs of an answer that the hook changed would tell what it took out: they are left out with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any, TypeAlias

from alignfast.online.feedback import TOKEN_FIELDS, Shown, Vote

Redact: TypeAlias = Callable[[str], str]


def load_redact(name: str) -> Redact:
    """A hook by its name, `package.module:function`; the working directory is looked in last.

    Raises:
        ValueError: there is no such function.

    >>> load_redact("textwrap:dedent")("  a")
    'a'
    """
    module, _, function = name.partition(":")
    path = list(sys.path)
    try:
        if "" not in sys.path:
            sys.path.append("")
        found = getattr(import_module(module), function) if function else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"redact={name!r} can't be imported: {error}") from error
    finally:
        sys.path[:] = path
    if not callable(found):
        raise ValueError(f"redact must name a function, package.module:function, got {name!r}")
    return found


def redacted_shown(shown: Shown, redact: Redact | None) -> Shown:
    """The answer as it may be stored.

    Raises:
        ValueError: the hook returned no text.
    """
    if redact is None:
        return shown
    prompt, text = _redacted(shown.prompt, redact), _redacted(shown.text, redact)
    if (prompt, text) == (shown.prompt, shown.text):
        return shown
    without: dict[str, Any] = dict.fromkeys(TOKEN_FIELDS, ())
    return replace(shown, prompt=prompt, text=text, **without)


def redacted_vote(vote: Vote, redact: Redact | None) -> Vote:
    """The vote as it may be stored.

    Raises:
        ValueError: the hook returned no text, or nothing of an edit.
    """
    if redact is None:
        return vote
    value = _redacted(vote.value, redact) if vote.kind == "edit" else vote.value
    return replace(vote, value=value, comment=_redacted(vote.comment, redact))


def _redacted(value: Any, redact: Redact) -> Any:
    if isinstance(value, str):
        found = redact(value) if value else value
        if not isinstance(found, str):
            raise ValueError(
                f"the redaction hook must return a text, got {type(found).__name__}; nothing was stored"
            )
        return found
    if isinstance(value, list):
        return [_redacted(item, redact) for item in value]
    if isinstance(value, dict):  # a role is no text of anybody's
        return {key: item if key == "role" else _redacted(item, redact) for key, item in value.items()}
    return value
