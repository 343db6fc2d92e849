"""Where the assistant speaks: by markers, by rendering turn by turn, or refused where a template rewrites turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignfast.data.templates import chat_options, render, render_turns, tokens_in_spans

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASK
)
# As Qwen3's: a block of thoughts stands before the last answer alone, and goes when another message follows.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
)
# As R1's: asks with an opened block of thoughts, which a finished conversation does not have.
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Writes what ends a conversation after its last message alone, as Phi 3's, unless it asks for an answer.
ENDED = CHATML + "{% if not add_generation_prompt %}</s>{% endif %}"
# Looks at all messages before it writes the first: the beginning differs with the length.
COUNTED = "{{ messages | length }}" + CHATML
# The rules of Qwen3's: thoughts that stand in a content are taken off every answer before the last question; the last
# message always has its block of thoughts, if an empty one; tool results are a user's turn, but no question.
QWEN3 = (
    "{% set ns = namespace(asked=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
QWEN3_MARKED = QWEN3.replace(
    "{% if loop.index0 > ns.asked", "{% generation %}{% if loop.index0 > ns.asked"
).replace("{{ said + '<|im_end|>\n' }}", "{{ said + '<|im_end|>\n' }}{% endgeneration %}")
# As SmolVLM's and Idefics3's: contents are lists of blocks, and of a string nothing is written.
BLOCKS = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.content is not string %}{% for block in m.content %}{{ block.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOLED = "{% if tools %}tools: {{ tools | length }} {{ mood }}\n{% endif %}" + CHATML

QUESTION, ANSWER = {"role": "user", "content": "h"}, {"role": "assistant", "content": "ok"}
TWO_TURNS = [QUESTION, ANSWER, {"role": "user", "content": "e"}, {"role": "assistant", "content": "he"}]

MakeTokenizer = Callable[..., Any]


def turns(make_tokenizer: MakeTokenizer, template: str, messages: list[dict[str, Any]]) -> list[str]:
    text, spans = render_turns(make_tokenizer(chat_template=template), messages, chat_options({}))
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("template", [CHATML, MARKED, OPENED])
def test_each_turn_is_found_with_what_ends_it(make_tokenizer: MakeTokenizer, template: str) -> None:
    assert turns(make_tokenizer, template, TWO_TURNS) == ["ok<|im_end|>\n", "he<|im_end|>\n"]


def test_thoughts_that_a_model_would_write_belong_to_its_turn(make_tokenizer: MakeTokenizer) -> None:
    assert turns(make_tokenizer, THINKING, TWO_TURNS[:2]) == ["<think>\n\n</think>\n\nok<|im_end|>\n"]


def test_what_ends_the_whole_conversation_belongs_to_a_last_turn(make_tokenizer: MakeTokenizer) -> None:
    assert turns(make_tokenizer, ENDED, TWO_TURNS[:2]) == ["ok<|im_end|>\n</s>"]


@pytest.mark.parametrize(
    ("template", "messages"), [(THINKING, TWO_TURNS), (ENDED, TWO_TURNS), (COUNTED, TWO_TURNS[:2])]
)
def test_templates_that_rewrite_earlier_turns_are_refused(
    make_tokenizer: MakeTokenizer, template: str, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(
        ValueError, match=r"renders message 1 .* differently when others follow.* a row of its own"
    ):
        turns(make_tokenizer, template, messages)


def test_turns_after_tool_results_and_in_a_row(make_tokenizer: MakeTokenizer) -> None:
    tool = {"role": "tool", "content": "4"}
    assert turns(make_tokenizer, CHATML, [QUESTION, ANSWER, tool, ANSWER, ANSWER]) == ["ok<|im_end|>\n"] * 3


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


THOUGHT = said("assistant", "<think>\nso\n</think>\n\nok")


def test_qwen3s_last_turn_is_found_with_its_thoughts(make_tokenizer: MakeTokenizer) -> None:
    assert turns(make_tokenizer, QWEN3, [QUESTION, THOUGHT]) == ["<think>\nso\n</think>\n\nok<|im_end|>\n"]
    assert turns(make_tokenizer, QWEN3, [QUESTION, ANSWER]) == ["<think>\n\n</think>\n\nok<|im_end|>\n"]


def test_qwen3s_empty_thoughts_that_are_asked_with_are_not_the_models(make_tokenizer: MakeTokenizer) -> None:
    options = chat_options({"chat_template_kwargs": {"enable_thinking": False}})
    text, spans = render_turns(make_tokenizer(chat_template=QWEN3), [QUESTION, ANSWER], options)
    assert [text[start:end] for start, end in spans] == ["ok<|im_end|>\n"]


@pytest.mark.parametrize("first", [ANSWER, THOUGHT])
def test_qwen3s_earlier_turns_are_refused_since_it_rewrites_them(
    make_tokenizer: MakeTokenizer, first: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"renders message 1 .* differently when others follow"):
        turns(make_tokenizer, QWEN3, [QUESTION, first, QUESTION, THOUGHT])


def test_qwen3_keeps_thoughts_between_tool_results(make_tokenizer: MakeTokenizer) -> None:
    calling = said("assistant", "<think>\nadd\n</think>\n\ncall")
    assert turns(make_tokenizer, QWEN3, [QUESTION, calling, said("tool", "4"), THOUGHT]) == [
        "<think>\nadd\n</think>\n\ncall<|im_end|>\n",
        "<think>\nso\n</think>\n\nok<|im_end|>\n",
    ]


def test_qwen3_with_markers_has_each_turn_as_it_is_rendered(make_tokenizer: MakeTokenizer) -> None:
    """Thoughts that are gone from an earlier turn are no dropped content."""
    assert turns(make_tokenizer, QWEN3_MARKED, [QUESTION, THOUGHT, QUESTION, THOUGHT]) == [
        "ok<|im_end|>\n",
        "<think>\nso\n</think>\n\nok<|im_end|>\n",
    ]


def test_templates_that_drop_what_is_said_are_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match=r"drops what the assistant says: 'ok' is not in '<\|im_end\|>"):
        turns(make_tokenizer, BLOCKS, [QUESTION, ANSWER])
    blocks = [said(m["role"], [{"type": "text", "text": m["content"]}]) for m in TWO_TURNS]
    assert turns(make_tokenizer, BLOCKS, blocks) == ["ok<|im_end|>\n", "he<|im_end|>\n"]
    # The markers stand around the end of the turn alone, and the content before them is not trained.
    missed = MARKED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}")
    with pytest.raises(ValueError, match="drops what the assistant says"):
        turns(make_tokenizer, missed, TWO_TURNS)


def test_one_turn_does_not_stand_for_another_of_the_same_words(make_tokenizer: MakeTokenizer) -> None:
    kept_only = MARKED.replace("{{ m.content }}<|im_end|>\n{% endgen", "{{ m.content if m.kept }}|{% endgen")
    with pytest.raises(ValueError, match=r"'ok' is not in '\|\|'"):
        turns(make_tokenizer, kept_only, [{**ANSWER, "kept": True}, ANSWER])


def test_conversations_without_a_findable_turn_are_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match="no assistant turn"):
        turns(make_tokenizer, CHATML, [QUESTION])
    with pytest.raises(ValueError, match="begins with the assistant"):
        turns(make_tokenizer, CHATML, [ANSWER])
    with pytest.raises(ValueError, match="marks none"):
        turns(make_tokenizer, MARKED.replace("== 'assistant'", "== 'model'"), TWO_TURNS)


def test_a_template_that_refuses_says_why(make_tokenizer: MakeTokenizer) -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="can't render these messages: roles must alternate"):
        render(make_tokenizer(chat_template=strict), TWO_TURNS, chat_options({}))
    adding = make_tokenizer(chat_template="{{ 'ok' + messages[0].content }}")
    with pytest.raises(ValueError, match="can't render these messages"):  # "ok" + None
        render(adding, [{"role": "user", "content": None}], chat_options({}))


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'])
def test_tools_and_variables_reach_the_template(make_tokenizer: MakeTokenizer, tools: Any) -> None:
    options = chat_options({"tools": tools, "chat_template_kwargs": {"mood": "calm"}})
    text = render(make_tokenizer(chat_template=TOOLED), [QUESTION], options)
    assert text == "tools: 1 calm\n<|im_start|>user\nh<|im_end|>\n"


@pytest.mark.parametrize("row", [{}, {"tools": None}, {"tools": []}, {"tools": "[]"}, {"tools": ""}])
def test_no_tools_are_none(row: dict[str, Any]) -> None:
    assert chat_options(row).tools is None


@pytest.mark.parametrize(
    ("tools", "message"), [("[{", "bad JSON"), ({"name": "add"}, "a list of tools, got dict")]
)
def test_tools_of_another_kind_are_refused(tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_options({"tools": tools})


def test_marked_tokens_equal_transformers_own_mask(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=MARKED)
    text, spans = render_turns(tokenizer, TWO_TURNS, chat_options({}))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    theirs = tokenizer.apply_chat_template(TWO_TURNS, return_assistant_tokens_mask=True)["assistant_masks"]
    assert tokens_in_spans(offsets, spans) == [bool(bit) for bit in theirs]


def test_all_bytes_of_a_character_at_the_border_belong_to_the_turn(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    offsets = tokenizer("a\N{GRINNING FACE}b", return_offsets_mapping=True)["offset_mapping"]
    assert tokens_in_spans(offsets, [(1, 2)]) == [False, True, True, True, True, False]
