"""Conversations as text through the tokenizer's chat template, and where in that text the assistant speaks.

Two ways to find the assistant's turns. A template may mark them itself with `{% generation %}`. If not, each turn
is the text between what a model would be asked to continue and what stands when it has answered:

    start_i = len(common prefix of full and render(m[:i], generation prompt))      end_i = len(render(m[:i + 1]))

which holds only if the template renders earlier messages alike whatever follows them; that is verified for every
turn, since some templates (Qwen3's, which drops earlier reasoning) rewrite them. And what is found must hold what the
assistant says: some templates (SmolVLM's, made for blocks) drop contents that are strings, and leave the end of turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alignfast.data.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatOptions(NamedTuple):
    """What a row hands its template besides the messages.

    Attributes:
        tools: JSON schemas of the functions that the assistant may call, or None.
        variables: further variables of the template, e.g. `{"enable_thinking": False}`.
    """

    tools: list[Any] | None
    variables: dict[str, Any]


def chat_options(row: Row) -> ChatOptions:
    """The row's `tools` (a list, or its JSON) and `chat_template_kwargs`.

    Raises:
        ValueError: the tools are neither a list nor the JSON of one.

    >>> chat_options({"messages": [], "tools": '[{"name": "add"}]'})
    ChatOptions(tools=[{'name': 'add'}], variables={})
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"column 'tools' is bad JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"column 'tools' must be a list of tools, got {type(tools).__name__}")
    # Some templates write the heading of the tools for an empty list too, hence None.
    return ChatOptions(tools or None, row.get("chat_template_kwargs") or {})


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: ChatOptions,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation as text, with all special tokens spelled out.

    Raises:
        ValueError: the template refuses these messages.
    """
    return _render(tokenizer, messages, options, add_generation_prompt)[0]


def render_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: ChatOptions
) -> tuple[str, list[Span]]:
    """A conversation as text, and the characters (start, end) of each turn that the assistant would generate.

    A turn takes in what ends it, e.g. `<|im_end|>`, and what the template puts before its content on its own, such
    as an empty block of thoughts, if a model would have to generate that.

    Raises:
        ValueError: the template refuses the messages, there is no assistant turn, the turns can't be found, or they lack
            what the assistant says.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("there is no assistant turn to train on")
    if _GENERATION.search(tokenizer.get_chat_template(None, options.tools)):
        text, spans = _render(tokenizer, messages, options, False, mark=True)
        if not spans:
            raise ValueError(
                "the chat template has {% generation %} markers, but marks none of this conversation's assistant "
                "turns; move the markers around what the assistant says"
            )
    else:
        text = render(tokenizer, messages, options)
        spans = [_turn(tokenizer, messages, options, text, index) for index in turns]
    require_contents([messages[index] for index in turns], "".join(text[start:end] for start, end in spans))
    return text, spans


def require_contents(messages: Sequence[Message], text: str) -> None:
    """Make sure that messages are found in a text, in their order; thoughts before `</think>` may be missing.

    Raises:
        ValueError: one is not.

    >>> require_contents([{"role": "assistant", "content": "so <think>2+2</think> 4 "}], "4<|im_end|>")
    >>> require_contents([{"role": "assistant", "content": "4"}], "<|im_end|>")
    Traceback (most recent call last):
    ValueError: the chat template drops what the assistant says: '4' is not in '<|im_end|>'; ...
    """
    end = 0
    for message in messages:
        for piece in _pieces(message):
            place = text.find(piece, end)
            if place < 0:
                raise ValueError(
                    f"the chat template drops what the {message['role']} says: {_shortened(piece)} is not in "
                    f"{_shortened(text[end:])}; if it is made for blocks, write contents as [{{'type': 'text', 'text': ...}}], "
                    "else use a template that renders them"
                )
            end = place + len(piece)


def _pieces(message: Message) -> list[str]:
    """What a template must render of a message; the white space around is its own to choose."""
    content = message.get("content") or ""
    blocks = [content] if isinstance(content, str) else [block["text"] for block in content]
    return [piece for block in blocks if (piece := block.rpartition("</think>")[2].strip())]


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: ChatOptions,
    text: str,
    index: int,
) -> Span:
    if index == 0:
        raise ValueError(
            "the conversation begins with the assistant, so that the start of its turn can't be told from its text; "
            "begin with a user or system message, or use a chat template with {% generation %} markers"
        )
    asked = render(tokenizer, messages[:index], options, add_generation_prompt=True)
    answered = render(tokenizer, messages[: index + 1], options)
    start = num_alike(asked, text)
    alike = text.startswith(answered)
    if alike and start < len(asked):
        # The generation prompt may hold what a conversation does not, e.g. an opened block of thoughts; what comes
        # before it may not differ.
        before = render(tokenizer, messages[:index], options)
        alike = text.startswith(before) and start >= len(before)
    if not alike:
        raise ValueError(
            f"the chat template has no {{% generation %}} markers and renders message {index} or an earlier one "
            "differently when others follow, so that the assistant's turns can't be told apart; make each "
            "assistant turn a row of its own (prompt: the messages before it, completion: the turn), or use a "
            "template with markers"
        )
    return start, len(answered)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: ChatOptions,
    add_generation_prompt: bool,
    mark: bool = False,
) -> tuple[str, list[Span]]:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    # Not tokenizer.apply_chat_template: it gives the marked characters only as tokens, one conversation a call.
    try:
        rendered: Any = render_jinja_template(  # its annotation says str; it gives texts and spans
            conversations=[list(messages)],
            tools=options.tools,
            chat_template=tokenizer.get_chat_template(None, options.tools),
            return_assistant_tokens_mask=mark,
            add_generation_prompt=add_generation_prompt,
            **{**tokenizer.special_tokens_map, **options.variables},
        )
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: text expected, None found
        raise ValueError(f"the chat template can't render these messages: {error}") from error
    (text,), spans = rendered
    return text, [(start, end) for start, end in spans[0] if end > start] if mark else []


def num_alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common prefix of two texts, or two lists of tokens.

    >>> num_alike([1, 2, 3], [1, 2, 4, 5]), num_alike("abc", "ab")
    (2, 2)
    """
    shortest = min(len(one), len(other))
    if one[:shortest] == other[:shortest]:
        return shortest
    return next(index for index in range(shortest) if one[index] != other[index])


def tokens_in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """True for tokens from the first to the last that touches a span of characters.

    Args:
        offsets: characters (start, end) of each token, in order.
        spans: characters (start, end) of each piece of text.

    >>> tokens_in_spans([(0, 2), (2, 5), (5, 5), (5, 7), (7, 8)], [(3, 7)])
    [False, True, True, True, False]
    """
    start_T, end_T = np.array(offsets, np.int64).reshape(-1, 2).T
    inside_T = np.zeros(len(start_T), np.bool_)
    for start, end in spans:
        # Tokenizers that trim spaces give some tokens no characters; those between two touching tokens belong too.
        (touching,) = np.nonzero((start_T < end) & (end_T > start))
        if len(touching):
            inside_T[touching[0] : touching[-1] + 1] = True
    return inside_T.tolist()
