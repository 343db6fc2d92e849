"""The number that a text gives as its answer, exactly, GSM8K style.

Looked for where the text marks it: after "####", on that line, or in \\boxed{...}, whichever comes last; of what is
marked the first number counts, after the last "=" if one follows it ("#### 3 * 4 = 12 km" is 12), and roots, powers and
other mathematics that LaTeX writes around it make it no number. Without a mark the last number of the text is the answer.

A number has a sign, a currency before or after the sign, thousands in groups of three (by commas, apostrophes, narrow
or LaTeX's spaces), decimals, an exponent (1e3), or is a fraction (3/4, 1 3/4, \\frac{3}{4}). Units are dropped, and a
per cent sign is one: "50%" is 50. A minus after a number, a word or a bracket is none: "10-3", "covid-19".

Not done here: algebra, powers, words ("five", "2 million"), decimal commas, "50%" as 0.5.
"""

from __future__ import annotations

import re
from fractions import Fraction

# A policy can write 1e999999999, which as a fraction fills the memory, and a number of a million digits.
_LONGEST = 400  # characters of a number, and size of an exponent
_CURRENCY = "[$\u20ac\u00a3\u00a5\u20b9]"  # dollar, euro, pound, yen, rupee
_SEPARATORS = ",'\u2019\u2009\u202f\u00a0"  # comma, two apostrophes, thin, narrow and plain no-break space
_WHOLE = rf"(?:[0-9]{{1,3}}(?:[{_SEPARATORS}][0-9]{{3}})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}.%])[-+])?
    (?:{_CURRENCY}\ ?(?P<inner>[-+])?)?
    (?: \\[dt]?frac\s*(?:\{{\s*(?P<top>[^{{}}\s]+)\s*\}}|(?P<top1>[0-9]))
        \s*(?:\{{\s*(?P<bottom>[^{{}}\s]+)\s*\}}|(?P<bottom1>[0-9]))
      | (?P<ones>{_WHOLE})\ (?P<part>[0-9]+)/(?P<parts>[0-9]+)(?![0-9/.])
      | (?P<value>{_DECIMAL})(?:[eE](?P<exponent>[-+]?[0-9]+))?(?:/(?P<over>{_DECIMAL}))?
    )
    """,
    re.VERBOSE | re.ASCII,
)
_PLAIN = {"\\$": "$", "\\%": "%", "{,}": ",", "\\,": "\u202f", "\\!": "", "\u2212": "-", "\u2013": "-"}
_BOX = "\\boxed{"
_POWER = re.compile(r"[0-9]\s*\^\s*(?!\{?\s*\\circ)")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_HARMLESS = {
    *"boxed frac dfrac tfrac left right text textbf textrm mathrm mathbf mbox quad circ degree".split()
}


def final_number(text: str, *, marked_only: bool = False) -> Fraction | None:
    """The number that a text gives as its answer; None where it gives none.

    Args:
        text: a completion, or a reference answer.
        marked_only: whether a number counts only after "####" or in \\boxed{...}.

    >>> final_number("She has 5 * 10 = $50, so she buys 7.\\n#### $1,250.50")
    Fraction(2501, 2)
    >>> final_number("so x = \\\\boxed{-\\\\frac{3}{4}} of the 20 cakes"), final_number("It costs 3/4 of 1e3.")
    (Fraction(-3, 4), Fraction(1000, 1))
    >>> final_number("I don't know"), final_number("It is 5", marked_only=True)
    (None, None)
    """
    hashes, box = text.rfind("####"), text.rfind(_BOX)
    if hashes < 0 and box < 0:
        return None if marked_only else _last_number(text)
    if hashes > box:
        answer: str | None = text[hashes + 4 :].strip().partition("\n")[0]
    else:
        answer = _box_content(text, box + len(_BOX))
    return None if answer is None else _marked_number(answer)


def reference_number(answer: object) -> Fraction | None:
    """The number of a row's own answer: a number, a text that is the answer, or a worked answer that marks it.

    >>> reference_number("1,250 apples"), reference_number("4 * 5 = 20\\n#### 20"), reference_number(0.1)
    (Fraction(1250, 1), Fraction(20, 1), Fraction(1, 10))
    >>> reference_number("2\\\\sqrt{3}"), reference_number(True)
    (None, None)
    """
    if isinstance(answer, bool):
        return None
    text = str(answer)
    return final_number(text) if "####" in text or _BOX in text else _marked_number(text)


def _marked_number(answer: str) -> Fraction | None:
    after = answer.rpartition("=")[2]
    for text in (after, answer):
        plain = _plain(text)
        match = _NUMBER.search(plain)
        if match is not None:
            algebra = _POWER.search(plain) or not {*_COMMAND.findall(plain)} <= _HARMLESS
            return None if algebra else _value(match)
    return None


def _box_content(text: str, start: int) -> str | None:
    """What stands in a box that was opened before `start`; None if it is never closed: the answer was cut short."""
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if not depth:
            return text[start:index]
    return None


def _last_number(text: str) -> Fraction | None:
    last = None
    for match in _NUMBER.finditer(_plain(text)):
        last = match
    return None if last is None else _value(last)


def _plain(text: str) -> str:
    for written, plain in _PLAIN.items():
        text = text.replace(written, plain)
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that was matched; None where it is none (a division by 0) or too long."""
    found = match.groupdict()
    if len(match[0]) > _LONGEST or abs(int(found["exponent"] or 0)) > _LONGEST:
        return None
    if found["top"] is not None or found["top1"] is not None:
        parts_of_it = (_NUMBER.fullmatch(found[name] or found[name + "1"]) for name in ("top", "bottom"))
        top, bottom = (None if part is None else _value(part) for part in parts_of_it)
    elif found["ones"] is not None:
        part, parts = int(found["part"]), int(found["parts"])
        ones = int(_digits(found["ones"])) if part < parts else 0  # "12 10/2" is no mixed number
        top, bottom = Fraction(ones * parts + part), Fraction(parts)
    else:
        top = Fraction(_digits(found["value"])) * Fraction(10) ** int(found["exponent"] or 0)
        bottom = Fraction(_digits(found["over"] or "1"))
    if top is None or not bottom:
        return None
    negative = (found["sign"] == "-") != (found["inner"] == "-")
    return -top / bottom if negative else top / bottom


def _digits(number: str) -> str:
    return re.sub(f"[{_SEPARATORS}]", "", number)
