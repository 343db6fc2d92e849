"""Ids and masks, recorded from TRL 1.16.

The expected values were printed by TRL's own `DPOTrainer._prepare_dataset` with its collator's truncation, and
`SFTTrainer._prepare_dataset`, on the same rows and the tokenizers of conftest.py. The ids in use:

    a 64  b 65  ab 256  he 257  " he" 258  " a" 259  " ab" 260  ok 261  " " 220  h 71  e 68
    <s> 262  </s> 263  <|im_start|> 265  <|im_end|> 266
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignfast.data import (
    DataError,
    Prepared,
    Tree,
    encode_completions,
    load_rows,
    prepare_preference,
    prepare_ranking,
    prepare_sft,
    prepare_thumbs,
)

MakeTokenizer = Callable[..., Any]
Sequence = tuple[list[int], list[int]]

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASK
)
USER = [265, 84, 82, 68, 81, 198]  # <|im_start|>user\n
ASSISTANT = [265, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198]  # <|im_start|>assistant\n
END = [266, 198]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def sequences(tree: Tree) -> list[Sequence]:
    """Each sequence of a tree as TRL has it: all ids, and 1 at those that carry loss."""
    return [
        ([*tree.prompt, *answer], [0] * len(tree.prompt) + [int(bit) for bit in trained])
        for answer, trained in zip(tree.answers, tree.trained)
    ]


def pair(prepared: Prepared) -> list[Sequence]:
    (tree,) = prepared.trees
    return sequences(tree)


def test_a_pair_is_cut_where_prompt_and_both_answers_stop_being_alike(make_tokenizer: MakeTokenizer) -> None:
    # "ok a" alone ends in " a"; before "b" that is " " + "ab", so the cut is after "ok" for both answers.
    rows = load_rows([{"prompt": "ok a", "chosen": "b", "rejected": " he"}])
    prepared = prepare_preference(rows, make_tokenizer(add_bos=True), max_length=None)
    assert pair(prepared) == [
        ([262, 261, 220, 256, 263], [0, 0, 1, 1, 1]),
        ([262, 261, 259, 258, 263], [0, 0, 1, 1, 1]),
    ]
    assert prepared.trees[0].prompt == (262, 261)
    assert prepared.report.prompt_tokens_moved == 1


def test_implicit_prompts(make_tokenizer: MakeTokenizer) -> None:
    prepared = prepare_preference(
        load_rows([{"chosen": "ok ab", "rejected": "ok he"}]), make_tokenizer(), max_length=None
    )
    assert pair(prepared) == [([261, 220, 256, 263], [0, 1, 1, 1]), ([261, 258, 263], [0, 1, 1])]


LONG = [{"prompt": "h ok", "chosen": " a ok", "rejected": " he"}]


def test_keep_start_cuts_answers(make_tokenizer: MakeTokenizer) -> None:
    prepared = prepare_preference(load_rows(LONG), make_tokenizer(), max_length=4)
    assert pair(prepared) == [([71, 220, 261, 259], [0, 0, 0, 1]), ([71, 220, 261, 258], [0, 0, 0, 1])]
    report = prepared.report
    assert (report.truncated_rows, report.tokens_lost, report.tokens, report.tokens_shared) == (1, 4, 8, 5)


def test_keep_end_cuts_prompts_and_unlike_ends_share_nothing(make_tokenizer: MakeTokenizer) -> None:
    prepared = prepare_preference(load_rows(LONG), make_tokenizer(), max_length=4, truncation_mode="keep_end")
    assert pair(prepared) == [([259, 220, 261, 263], [1, 1, 1, 1]), ([220, 261, 258, 263], [0, 0, 1, 1])]
    assert prepared.trees[0].prompt == ()
    # The first token of the chosen answer has lost its predecessor.
    assert prepared.report.trained_tokens == 3 + 2


def test_keep_end_where_both_keep_some_of_the_prompt_but_not_as_much(make_tokenizer: MakeTokenizer) -> None:
    prepared = prepare_preference(load_rows(LONG), make_tokenizer(), max_length=5, truncation_mode="keep_end")
    assert pair(prepared) == [
        ([261, 259, 220, 261, 263], [0, 1, 1, 1, 1]),
        ([71, 220, 261, 258, 263], [0, 0, 0, 1, 1]),
    ]


def test_keep_end_with_answers_of_one_length_still_shares(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([{"prompt": "h ok", "chosen": " he", "rejected": " a"}])
    (tree,) = prepare_preference(rows, make_tokenizer(), max_length=4, truncation_mode="keep_end").trees
    assert (tree.prompt, tree.answers) == ((220, 261), ((258, 263), (259, 263)))


def test_rows_without_a_trained_token_are_dropped_and_counted(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([*LONG, {"prompt": "h", "chosen": "a", "rejected": "b"}])
    prepared = prepare_preference(rows, make_tokenizer(), max_length=3)
    assert prepared.rows == [1]  # the first row's prompt alone fills three tokens
    assert (prepared.report.rows, prepared.report.dropped_rows) == (1, 1)
    assert prepared.report.tokens_lost == 12
    assert "1 row dropped" in prepared.report.summary()


def test_prompt_and_completion(make_tokenizer: MakeTokenizer) -> None:
    rows, tokenizer = load_rows([{"prompt": "ok a", "completion": "b he"}]), make_tokenizer(add_bos=True)
    ids = [262, 261, 220, 256, 258, 263]
    assert pair(prepare_sft(rows, tokenizer, max_length=None)) == [(ids, [0, 0, 1, 1, 1, 1])]
    whole = prepare_sft(rows, tokenizer, max_length=None, completion_only_loss=False)
    assert pair(whole) == [(ids, [1] * 6)]
    assert whole.report.trained_tokens == 5  # nothing predicts the first


def test_text_gets_one_beginning_and_one_end(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([{"text": "he ok"}, {"text": "ok</s>"}])
    trees = prepare_sft(rows, make_tokenizer(add_bos=True), max_length=None).trees
    assert [sequences(tree) for tree in trees] == [
        [([262, 257, 220, 261, 263], [1] * 5)],
        [([262, 261, 263], [1] * 3)],
    ]


def test_a_tokenizer_that_ends_by_itself_or_a_text_that_begins_by_itself_changes_nothing(
    make_tokenizer: MakeTokenizer,
) -> None:
    """Here TRL has the token twice."""
    tokenizer = make_tokenizer(add_bos=True, add_eos=True)
    rows = load_rows([{"prompt": "<s>ok", "completion": " he"}, {"prompt": "ok", "completion": " he"}])
    prepared = prepare_sft(rows, tokenizer, max_length=None)
    assert [sequences(tree) for tree in prepared.trees] == [[([262, 261, 258, 263], [0, 0, 1, 1])]] * 2
    assert prepared.report.prompt_tokens_moved == 0


def test_a_tokenizer_without_pad_or_beginning_as_gpt2(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos_token=None)
    rows = load_rows([("Prompt 1", "Preferred", "Dispreferred")])
    (tree,) = prepare_preference(rows, tokenizer, max_length=None).trees
    assert tokenizer.pad_token is None
    assert tokenizer.decode(tree.prompt) == "Prompt 1"
    assert [tokenizer.decode(answer) for answer in tree.answers] == ["Preferred</s>", "Dispreferred</s>"]


def test_conversational_pairs(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([{"prompt": [user("h")], "chosen": [assistant("ok")], "rejected": [assistant("he")]}])
    # A template writes its own special tokens: the tokenizer's beginning must not come on top.
    tokenizer = make_tokenizer(add_bos=True, chat_template=CHATML)
    prepared = prepare_preference(rows, tokenizer, max_length=None)
    prompt = [*USER, 71, *END, *ASSISTANT]
    assert pair(prepared) == [
        ([*prompt, 261, *END], [0] * 20 + [1] * 3),
        ([*prompt, 257, *END], [0] * 20 + [1] * 3),
    ]
    assert prepared.report.prompt_tokens_moved == 0


CHAT = [user("h"), assistant("ok"), user("e"), assistant("he")]


def test_messages_train_everything_or_the_assistants_turns(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([{"messages": CHAT}])
    ids = [*USER, 71, *END, *ASSISTANT, 261, *END, *USER, 68, *END, *ASSISTANT, 257, *END]
    everything = prepare_sft(rows, make_tokenizer(chat_template=CHATML), max_length=None)
    assert pair(everything) == [(ids, [1] * len(ids))]
    for template in (MARKED, CHATML):  # TRL's masks are those of the marked template
        prepared = prepare_sft(
            rows, make_tokenizer(chat_template=template), max_length=None, assistant_only_loss=True
        )
        assert pair(prepared) == [(ids, [0] * 20 + [1] * 3 + [0] * 20 + [1] * 3)]


def test_completion_and_assistant_masks_both_apply(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([{"prompt": CHAT[:2], "completion": CHAT[2:]}])
    tokenizer = make_tokenizer(chat_template=CHATML)
    prepared = prepare_sft(rows, tokenizer, max_length=None, assistant_only_loss=True)
    ((_, mask),) = pair(prepared)
    assert mask == [0] * 43 + [1] * 3  # the prompt's own assistant turn carries no loss
    both = prepare_sft(rows, tokenizer, max_length=None, assistant_only_loss=True, completion_only_loss=False)
    assert pair(both)[0][1] == [0] * 20 + [1] * 3 + [0] * 20 + [1] * 3


def test_more_rows_than_one_call_of_the_tokenizer_takes(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([{"prompt": "h" * (n % 7 + 1), "completion": "a"} for n in range(2345)])
    prepared = prepare_sft(rows, make_tokenizer(), max_length=None)
    assert prepared.rows == list(range(2345))
    assert [len(tree.prompt) for tree in prepared.trees] == [n % 7 + 1 for n in range(2345)]


def test_the_report_adds_up(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([{"prompt": "h" * n, "chosen": "a" * n, "rejected": "b"} for n in range(1, 12)])
    whole = prepare_preference(rows, make_tokenizer(), max_length=None).report
    for mode in ("keep_start", "keep_end"):
        prepared = prepare_preference(rows, make_tokenizer(), max_length=8, truncation_mode=mode)
        report = prepared.report
        assert report.tokens + report.tokens_lost == whole.tokens
        assert report.rows + report.dropped_rows == len(rows)
        assert report.rows == len(prepared.trees) == len(prepared.rows)
        assert report.truncated_rows > 0
        assert report.tokens_shared == sum(tree.num_tokens for tree in prepared.trees)
    assert whole.largest_token_id == 263


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a"}, {"completion_only_loss": True}, "needs prompt.completion, got rows of 'text'"),
        ({"text": "a"}, {"assistant_only_loss": True}, "needs conversations"),
        ({"text": "a"}, {"max_length": 0}, "max_length must be >= 1"),
        (
            {"text": "a"},
            {"truncation_mode": "keep_middle"},
            "'keep_middle' is not one of keep_start, keep_end",
        ),
        ({"messages": CHAT}, {}, "no chat template"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {},
            r"SFT takes text, messages, prompt\+completion, got the columns prompt, chosen, rejected",
        ),
    ],
)
def test_sft_refuses(
    make_tokenizer: MakeTokenizer, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_sft(load_rows([row]), make_tokenizer(), **{"max_length": None, **options})


CHAT_PAIR = {"chosen": CHAT, "rejected": [*CHAT[:3], assistant("h")]}


@pytest.mark.parametrize(
    ("more", "plain"),
    [
        ({"prompt": "ok", **CHAT_PAIR, "messages": CHAT}, {"messages": CHAT}),  # UltraFeedback's columns
        ({"prompt": "ok", "completion": "he", "label": False}, {"prompt": "ok", "completion": "he"}),
        ({"prompt": "ok", "completion": "he", "label": 2}, {"prompt": "ok", "completion": "he"}),
        ({"chosen": "a", "rejected": "b", "completion": "h", "text": "ok"}, {"text": "ok"}),
    ],
)
def test_sft_takes_the_format_that_it_can_use(
    make_tokenizer: MakeTokenizer, more: dict[str, Any], plain: dict[str, Any]
) -> None:
    """The last has no prompt of its own: the one that chosen and rejected were split by makes no prompt+completion."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    found, expected = (prepare_sft(load_rows([row]), tokenizer, max_length=None) for row in (more, plain))
    assert found.trees == expected.trees


def test_of_several_formats_pairs_are_still_taken_as_pairs(make_tokenizer: MakeTokenizer) -> None:
    row = {"prompt": "ok", **CHAT_PAIR, "messages": CHAT}
    tokenizer = make_tokenizer(chat_template=CHATML)
    found, expected = (
        prepare_preference(load_rows([row]), tokenizer, max_length=None) for row in (row, CHAT_PAIR)
    )
    assert found.trees == expected.trees


def test_a_row_that_lacks_what_the_other_format_needs_is_named(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([{**CHAT_PAIR, "messages": CHAT}, {**CHAT_PAIR, "messages": None}])
    with pytest.raises(DataError, match=r"list of 2 rows, index 1: column 'messages' is missing a value"):
        prepare_sft(rows, make_tokenizer(chat_template=CHATML), max_length=None)


def test_preference_refuses_other_formats(make_tokenizer: MakeTokenizer) -> None:
    rows = load_rows([{"prompt": "a", "ranking": ["b", "c"]}])
    with pytest.raises(DataError, match=r"takes chosen\+rejected, got the columns prompt, ranking"):
        prepare_preference(rows, make_tokenizer(), max_length=None)


def test_a_tokenizer_without_an_end_token_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        prepare_sft(load_rows([{"text": "a"}]), make_tokenizer(eos_token=None), max_length=None)


def test_a_template_error_names_the_row(make_tokenizer: MakeTokenizer) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    rows = load_rows([{"messages": CHAT}, {"messages": CHAT[1:]}])
    with pytest.raises(DataError, match=r"list of 2 rows, index 1: .*user first"):
        prepare_sft(rows, make_tokenizer(chat_template=strict), max_length=None)


def test_answers_that_the_template_drops_are_an_error_that_names_the_row(
    make_tokenizer: MakeTokenizer,
) -> None:
    """Chosen and rejected would be the same: the end of the turn alone."""
    empty = CHATML.replace("{{ m.content }}", "{% if m.content is not string %}{{ m.content }}{% endif %}")
    tokenizer = make_tokenizer(chat_template=empty)
    answers = {"chosen": [assistant("ok")], "rejected": [assistant("he")]}
    with pytest.raises(DataError, match=r"index 0: the chat template drops what the assistant says: 'ok'"):
        prepare_preference(load_rows([{"prompt": [user("h")], **answers}]), tokenizer, max_length=None)
    with pytest.raises(DataError, match=r"index 0: the chat template drops what the assistant says: 'he'"):
        prepare_sft(load_rows([{"messages": CHAT}]), tokenizer, max_length=None)


@pytest.mark.parametrize("options", [{}, {"add_bos": True}, {"add_bos": True, "add_eos": True}])
def test_completions_are_judged_on_the_ids_of_training(
    make_tokenizer: MakeTokenizer, options: dict[str, Any]
) -> None:
    tokenizer = make_tokenizer(**options)
    pairs = [("a", "b ok"), ("he", " he</s>"), ("", "ok")]
    rows = load_rows([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    trees = prepare_sft(rows, tokenizer, max_length=None).trees
    wanted = [[*tree.prompt, *tree.answers[0]] for tree in trees]
    assert encode_completions(*map(list, zip(*pairs)), tokenizer) == wanted
    (empty,) = encode_completions(["ok"], [""], tokenizer)  # which no row of training may be
    assert empty[-1] == tokenizer.eos_token_id


def test_conversations_are_judged_on_the_ids_of_training(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    prompt, completion = [{"role": "user", "content": "he"}], [{"role": "assistant", "content": "ok"}]
    (tree,) = prepare_sft(
        load_rows([{"prompt": prompt, "completion": completion}]), tokenizer, max_length=None
    ).trees
    assert encode_completions([prompt], [completion], tokenizer) == [[*tree.prompt, *tree.answers[0]]]
    assert encode_completions([], [], tokenizer) == []


def test_completions_of_another_number_or_kind_are_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="got 1 prompts and 2 completions"):
        encode_completions(["a"], ["b", "c"], tokenizer)
    message = [{"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="says that all are texts, and prompt or completion 0 is not"):
        encode_completions(["a"], [message], tokenizer)  # type: ignore[list-item]


PAIRS = [
    {"prompt": "ok a", "chosen": "b", "rejected": " he"},
    {"prompt": [user("he")], "chosen": [assistant("ok")], "rejected": [assistant("ab ab")]},
]


@pytest.mark.parametrize("row", PAIRS, ids=["plain", "conversation"])
def test_thumbs_and_rankings_have_the_ids_of_pairs(
    row: dict[str, Any], make_tokenizer: MakeTokenizer
) -> None:
    """Each thumb is one side of the pair, cut where its own prompt ends; a ranking of two is the pair."""
    tokenizer = make_tokenizer(add_bos=True)
    tokenizer.chat_template = CHATML
    pairs = load_rows([row])
    expected = pair(prepare_preference(pairs, tokenizer, max_length=None))
    ranking = {"prompt": row["prompt"], "ranking": [row["chosen"], row["rejected"]]}
    assert pair(prepare_ranking(load_rows([ranking]), tokenizer, max_length=None)) == expected
    assert pair(prepare_ranking(pairs, tokenizer, max_length=None)) == expected
    thumbs = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
    ]
    for given in (load_rows(thumbs), pairs):  # pairs are taken apart
        prepared = prepare_thumbs(given, tokenizer, max_length=None)
        assert [tree.label for tree in prepared.trees] == [1, 0]
        assert [sequences(tree)[0][0] for tree in prepared.trees] == [ids for ids, _ in expected]
        assert prepared.rows == ([0, 1] if given is not pairs else [0, 0])


def test_a_ranking_keeps_its_order_and_a_pair_its_margin(make_tokenizer: MakeTokenizer) -> None:
    rows = [
        {"prompt": "ok", "ranking": [" he", " a", " ab"]},
        {"prompt": "a", "ranking": [" a", " he"]},
    ]
    first, second = prepare_ranking(load_rows(rows), make_tokenizer(), max_length=None).trees
    assert first.answers == ((258, 263), (259, 263), (220, 256, 263))
    assert second.answers == ((259, 263), (258, 263))
    margins = [{"prompt": "ok", "chosen": " he", "rejected": " a", "margin": margin} for margin in (2, 0.5)]
    trees = prepare_ranking(load_rows(margins), make_tokenizer(), max_length=None).trees
    assert [tree.label for tree in trees] == [2.0, 0.5]


def test_rows_that_are_too_long_are_left_out_of_rankings(make_tokenizer: MakeTokenizer) -> None:
    """An answer without its end is another answer; the other modes cut it when asked."""
    rows = load_rows([("ok", " he", " a"), ("ok", " he he he", " a"), ("ok", " a", " he")])
    prepared = prepare_ranking(rows, make_tokenizer(), max_length=3)
    assert prepared.rows == [0, 2]
    assert (prepared.report.too_long_rows, prepared.report.dropped_rows, prepared.report.tokens_lost) == (
        1,
        0,
        8,
    )
    assert "1 row longer than max_length left out" in prepared.report.summary()
    cut = prepare_ranking(rows, make_tokenizer(), max_length=3, truncation_mode="keep_end")
    assert cut.rows == [0, 1, 2]


def test_a_missing_margin_names_its_row(make_tokenizer: MakeTokenizer) -> None:
    rows = [{"prompt": "ok", "chosen": " he", "rejected": " a", **margin} for margin in ({"margin": 1.0}, {})]
    with pytest.raises(DataError, match="index 1: column 'margin' must be a number, got None"):
        prepare_ranking(load_rows(rows), make_tokenizer(), max_length=None)
