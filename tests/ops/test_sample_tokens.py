"""sample_tokens: the definition against transformers' warpers, every backend against the definition, frequencies.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import conformance as c
from torch import Tensor
from transformers.generation import logits_process as theirs

from alignfast.kernels import sample_tokens
from alignfast.kernels._philox import philox, uniform
from alignfast.kernels.sample_tokens import SampleOptions, least_kept, sample_options

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_every_backend = pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("sample_tokens", every_isa=True)
)
# None; each filter alone; all at once; so sharp that few stay; a top-k beyond the blocks of a row; greedy.
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"top_k": 3, "top_p": 0.5, "min_p": 0.5},
    {"top_k": 1500, "top_p": 0.99},
    {"temperature": 0.0},
]
# A sum of float32 weights is off by few units in the last place of 1: then u may fall to a neighbour.
ROUNDING = 1e-6


class Rows(NamedTuple):
    """Logits of a trained model's spread, and where each row stands; counters use all of their 64 bits."""

    logits_BV: Tensor
    sequence_B: Tensor
    position_B: Tensor

    @classmethod
    def random(cls, B: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Rows:
        generator = torch.Generator().manual_seed(seed)
        logits_BV = (3 * torch.randn(B, V, generator=generator)).to(dtype)
        counters_2B = torch.randint(-(2**63), 2**63 - 1, (2, B), generator=generator)
        return cls(logits_BV, *counters_2B)

    def draw(self, device: str = "cpu", seed: int = 7, **options: Any) -> list[Tensor]:
        """Tokens, log-probs and sampled log-probs, on the CPU."""
        logits_BV, sequence_B, position_B = (x.to(device) for x in self)
        drawn = sample_tokens(logits_BV, sequence_B=sequence_B, position_B=position_B, seed=seed, **options)
        return [x.cpu() for x in drawn]

    def take(self, index_B: Tensor | slice) -> Rows:
        return Rows(*(x[index_B] for x in self))


def warped(
    logits_BV: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Logits as transformers' sampling leaves them, in its order."""
    warpers = theirs.LogitsProcessorList()
    if temperature != 1:
        warpers.append(theirs.TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(theirs.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(theirs.MinPLogitsWarper(min_p))
    return warpers(torch.zeros(len(logits_BV), 1, dtype=torch.int64), logits_BV)


def under(x_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return x_BV.log_softmax(1).gather(1, tokens_B[:, None])[:, 0]


def complete(options: dict[str, Any]) -> SampleOptions:
    return sample_options(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7} | options)


def clear_of_the_edge(rows: Rows, options: SampleOptions) -> Rows:
    """Without the rows whose likeliest reach top_p by so little that rounding decides what is kept."""
    if options.top_p == 1:
        return rows
    z_BV = rows.logits_BV.double()
    fewer, more = (options._replace(top_p=options.top_p * (1 + sign * ROUNDING)) for sign in (-1, 1))
    clear_B = (least_kept(z_BV, fewer) == least_kept(z_BV, more))[:, 0]
    assert (~clear_B).sum() <= 1 + 0.1 * len(clear_B)  # where a row reaches 0.99, a token has 1e-5 of it
    return rows.take(clear_B)


def conform(backend: str, device: str, rows: Rows, **chosen: Any) -> None:
    """The definition's tokens but within rounding of a border, and their log-probs by the rule of conformance."""
    options = complete(chosen)
    rows = clear_of_the_edge(rows, options)
    before_BV = rows.logits_BV.clone()
    tokens_B, *ours = rows.draw(device, backend=backend, **chosen)
    z_BV = rows.logits_BV.double()
    exact_B, *gold = rows._replace(logits_BV=z_BV).draw(backend="torch", **chosen)
    hidden_BV = z_BV < least_kept(z_BV, options)
    p_BV = (z_BV / options.temperature).masked_fill(hidden_BV, -math.inf).softmax(1)
    u_B = torch.zeros(len(z_BV)) if options.greedy else uniform(7, rows.sequence_B, rows.position_B)
    above_B = p_BV.cumsum(1).gather(1, tokens_B[:, None])[:, 0]
    below_B = above_B - p_BV.gather(1, tokens_B[:, None])[:, 0]
    assert not hidden_BV.gather(1, tokens_B[:, None]).any(), "a filtered token was drawn"
    assert torch.all((below_B - ROUNDING <= u_B) & (u_B <= above_B + ROUNDING)), "not the token of u"

    same_B = tokens_B == exact_B
    assert (~same_B).sum() <= 0.01 * len(same_B)
    x_BV = rows.logits_BV.float() / options.temperature
    peers = [under(x_BV, exact_B), under(x_BV.masked_fill(hidden_BV, -math.inf), exact_B)]
    if options.greedy:
        peers[1] = torch.zeros_like(peers[1])
    for name, mine_B, peer_B, gold_B in zip(("logps", "sampled"), ours, peers, gold):
        crowd_error = c.error(peer_B, gold_B).largest
        c.hold(name, mine_B[same_B], peer_B[same_B], gold_B[same_B], crowd_error=crowd_error)
    assert torch.equal(rows.logits_BV.nan_to_num(), before_BV.nan_to_num()), "an input was written to"


# --- random numbers ---

# Random123's kat_vectors for philox4x32 10: counter, key, result
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(low: int, high: int) -> int:
    return (low | high << 32) - (2**64 if high >> 31 else 0)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_known_answers(counter: str, key: str, result: str) -> None:
    low, high = words(key)
    counter_1 = tuple(torch.tensor([word]) for word in words(counter))
    assert [int(word_1) for word_1 in philox((low, high), counter_1)] == words(result)
    a, b, c_, d = words(counter)
    (u,) = uniform(low | high << 32, torch.tensor([signed(c_, d)]), torch.tensor([signed(a, b)])).tolist()
    first, second, _, _ = words(result)
    assert u == (first << 32 | second) // 2**11 / 2**53


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
@on_every_backend
def test_known_answers_on_every_backend(
    backend: str, device: str, counter: str, key: str, result: str
) -> None:
    """Equal logits of a power of two of tokens: sums are exact, and the token is the first bits of the first word."""
    bits = 12 if backend in c.INTERPRETED else 16
    a, b, c_, d = words(counter)
    rows = Rows(torch.zeros(1, 2**bits), torch.tensor([signed(c_, d)]), torch.tensor([signed(a, b)]))
    low, high = words(key)
    (token,) = rows.draw(device, low | high << 32, backend=backend)[0].tolist()
    assert token == words(result)[0] >> 32 - bits


# --- the definition ---


@pytest.mark.parametrize("V", [5, 503])
@pytest.mark.parametrize("options", FILTERS[:-1], ids=str)
def test_filters_are_those_of_transformers(options: dict[str, Any], V: int) -> None:
    rows = Rows.random(200, V)
    z_BV = rows.logits_BV.double()
    x_BV = warped(z_BV, **options)
    kept_BV = z_BV >= least_kept(z_BV, complete(options))
    assert torch.equal(kept_BV, x_BV > -math.inf)
    tokens_B, logps_B, sampled_B = rows._replace(logits_BV=z_BV).draw(backend="torch", **options)
    assert torch.allclose(logps_B, under(z_BV / complete(options).temperature, tokens_B), rtol=1e-12)
    assert torch.allclose(sampled_B, under(x_BV, tokens_B), rtol=1e-12, atol=1e-15)


def test_equals_are_kept_together() -> None:
    """As transformers does for top-k; for top-p it keeps some of them, by the order of its sort."""
    z_BV = torch.tensor([[2.0, 1, 1, 1, 0]], dtype=torch.float64)
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        kept_BV = z_BV >= least_kept(z_BV, complete(options))
        assert kept_BV.tolist() == [[True, True, True, True, False]]
        theirs_BV = warped(z_BV, **options) > -math.inf
        assert torch.equal(kept_BV, theirs_BV) == ("top_k" in options)
        assert torch.all(kept_BV | ~theirs_BV)


def test_top_p_counts_what_top_k_left() -> None:
    """0.45, 0.3, 0.25 of the whole; of the first two 0.6, 0.4: 0.5 is reached by one of two, not of three."""
    rows = Rows(torch.tensor([[0.45, 0.3, 0.25]]).log(), *torch.zeros(2, 1, dtype=torch.int64))
    alone = rows.draw(backend="torch", top_k=2, top_p=0.5)
    assert alone[2].tolist() == [0.0]
    z_BV = rows.logits_BV.double()
    assert (z_BV >= least_kept(z_BV, complete({"top_p": 0.5}))).sum() == 2


# --- every backend ---


# V: below a vector; below a block; several of each backend's blocks with a ragged tail (prime).
# B: one, and more than the threads.
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize(("B", "V"), [(9, 5), (40, 503), (7, 5003)])
@on_every_backend
def test_holds(backend: str, device: str, B: int, V: int, options: dict[str, Any]) -> None:
    if backend in c.INTERPRETED:
        B = min(B, 1 + 1000 // V)  # 5 ms a pass over a row of 5003
    dtype = DTYPES[(V + FILTERS.index(options)) % 3]
    conform(backend, device, Rows.random(B, V, dtype), **options)


@pytest.mark.parametrize(
    ("backend", "device"), c.backends_for("sample_tokens", only=("native",), every_isa=True)
)
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(backend: str, device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    conform(backend, device, Rows.random(500, 1037, dtype, seed=1), **options)


# The edges of each filter: one token; all of them, by a number and by a larger one.
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, 1), ({"top_k": 37}, 37), ({"top_k": 1000}, 37), ({"top_p": 0.0}, 1), ({"top_p": 1e-9}, 1),
        ({"top_p": 1.0}, 37), ({"min_p": 1.0}, 1), ({"min_p": 1e-30}, 37), ({"top_k": 4, "top_p": 1 - 1e-12}, 4),
    ],
    ids=str,
)  # fmt: skip
@on_every_backend
def test_edges_of_filters(backend: str, device: str, options: dict[str, Any], kept: int) -> None:
    rows = Rows.random(3, 37)
    _, logps_B, sampled_B = rows.draw(device, backend=backend, **options)
    mass_B = rows.logits_BV.double().softmax(1).sort(1, descending=True).values[:, :kept].sum(1)
    assert torch.allclose((logps_B - sampled_B).double(), mass_B.log(), atol=1e-6)


@on_every_backend
def test_greedy(backend: str, device: str) -> None:
    """The first of the largest, as torch.argmax, under temperature 1, whatever the filters say."""
    rows = Rows.random(5, 83)
    rows.logits_BV[:, [7, 40, 82]] = 20.0
    tokens_B, logps_B, sampled_B = rows.draw(
        device, backend=backend, temperature=0.0, top_k=2, top_p=0.1, min_p=0.9
    )
    assert tokens_B.tolist() == rows.logits_BV.argmax(1).tolist() == [7] * 5
    assert torch.allclose(logps_B, under(rows.logits_BV, tokens_B))
    assert not sampled_B.any()


@on_every_backend
def test_a_token_of_minus_infinity_is_never_drawn(backend: str, device: str) -> None:
    """Also where it comes first and u is small, and where a filter would keep more than there are."""
    rows = Rows.random(3 if backend in c.INTERPRETED else 20, 37)
    rows.logits_BV[:, 1::2] = -math.inf
    rows.logits_BV[:, 0] = -math.inf
    for options in ({}, {"top_k": 30}, {"top_p": 0.999}, {"temperature": 0.0}):
        tokens_B, logps_B, sampled_B = rows.draw(device, backend=backend, **options)
        assert torch.all((tokens_B % 2 == 0) & (tokens_B > 0))
        assert torch.all(logps_B.isfinite() & sampled_B.isfinite())
    only = Rows(torch.full((1, 9), -math.inf), *rows.take(slice(1))[1:])
    only.logits_BV[0, 4] = -1e30
    assert [x.tolist() for x in only.draw(device, backend=backend)] == [[4], [0.0], [0.0]]


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.0}], ids=str
)
@on_every_backend
def test_rows_without_a_distribution(backend: str, device: str, options: dict[str, Any]) -> None:
    """NaN, inf, nothing but -inf: token -1 and NaN there, and no other row changes."""
    rows = Rows.random(5, 37)
    clean = rows.draw(device, backend=backend, **options)
    rows.logits_BV[0, 36], rows.logits_BV[2, 5], rows.logits_BV[3] = math.nan, math.inf, -math.inf
    tokens_B, *logps = rows.draw(device, backend=backend, **options)
    assert tokens_B[[0, 2, 3]].tolist() == [-1, -1, -1]
    for x_B, clean_B in zip((tokens_B, *logps), clean):
        assert torch.equal(x_B[[1, 4]], clean_B[[1, 4]])
        assert x_B[[0, 2, 3]].double().add(1).nan_to_num().eq(0).all()


@on_every_backend
def test_log_probs_near_zero_keep_their_digits(backend: str, device: str) -> None:
    """A margin of 18 nats: x - lse in float32 would be 0."""
    logits_BV = torch.full((1, 9), -30.0)
    logits_BV[0, 4], logits_BV[0, 7] = 5.0, -13.0
    rows = Rows(logits_BV, *torch.zeros(2, 1, dtype=torch.int64))
    exact = -math.log1p(math.exp(-18) + 7 * math.exp(-35))
    for options in ({}, {"temperature": 0.0}):
        token_B, logps_B, _ = rows.draw(device, backend=backend, **options)
        assert token_B.tolist() == [4]
        assert logps_B.item() == pytest.approx(exact, rel=1e-6)


@on_every_backend
def test_large_logits(backend: str, device: str) -> None:
    """1e4 and more apart, where exp of anything but a difference overflows; the coldest temperature."""
    rows = Rows.random(6, 83)
    rows.logits_BV.mul_(1e4)
    for options in ({}, {"top_p": 0.9}, {"temperature": 1e-6}, {"top_k": 7, "temperature": 1e5}):
        conform(backend, device, rows, **options)


@pytest.mark.parametrize("layout", c.layouts(torch.zeros(2, 2)))
@on_every_backend
def test_strides(backend: str, device: str, layout: str) -> None:
    rows = Rows.random(4, 83, torch.bfloat16)
    wanted = rows.draw(device, backend=backend, top_k=10)
    logits_BV = c.layouts(rows.logits_BV.to(device))[layout]
    if layout == "one row expanded":
        wanted = Rows(logits_BV.contiguous(), *rows[1:]).draw(device, backend=backend, top_k=10)
    spread_B2 = torch.stack(rows[1:], 1).to(device)
    sequence_B, position_B = spread_B2[:, 0], spread_B2[:, 1]
    drawn = sample_tokens(
        logits_BV, sequence_B=sequence_B, position_B=position_B, seed=7, backend=backend, top_k=10
    )
    for x_B, wanted_B in zip(drawn, wanted):
        assert torch.equal(x_B.cpu(), wanted_B)


@pytest.mark.parametrize(("B", "V"), [(0, 5), (3, 1)])
@on_every_backend
def test_nothing_to_choose(backend: str, device: str, B: int, V: int) -> None:
    tokens_B, logps_B, sampled_B = Rows.random(B, V).draw(device, backend=backend)
    assert tokens_B.shape == logps_B.shape == sampled_B.shape == (B,)
    assert not torch.cat((tokens_B, logps_B, sampled_B)).any()


# --- what a sample depends on ---


@on_every_backend
def test_a_sample_is_its_counters(backend: str, device: str) -> None:
    """Rows in any order, alone or in another batch, give the same bits; another seed or counter other tokens."""
    rows = Rows.random(12, 83)
    # no bisection in the interpreter: 0.1 s a row
    options = {"min_p": 0.05} if backend in c.INTERPRETED else {"top_p": 0.95}
    options["backend"] = backend
    drawn = rows.draw(device, **options)
    order_B = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for part_B in (order_B, slice(5, 6), slice(0, 7)):
        for x_B, part_x_B in zip(drawn, rows.take(part_B).draw(device, **options)):
            assert torch.equal(x_B[part_B], part_x_B)
    others = [
        rows.draw(device, seed=8, **options)[0],
        rows.draw(device, seed=7 + 2**32, **options)[0],
        rows._replace(sequence_B=rows.sequence_B + 1).draw(device, **options)[0],
        rows._replace(sequence_B=rows.sequence_B + 2**32).draw(device, **options)[0],
        rows._replace(position_B=rows.position_B + 1).draw(device, **options)[0],
        rows._replace(position_B=rows.position_B + 2**32).draw(device, **options)[0],
    ]
    for tokens_B in others:
        assert not torch.equal(tokens_B, drawn[0])


@pytest.mark.parametrize(("backend", "device"), c.backends_for("sample_tokens", only=("native",)))
def test_threads_change_nothing(backend: str, device: str) -> None:
    rows = Rows.random(20, 30000)  # past half a million numbers, where threads begin
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(rows.draw(device, backend=backend, top_k=50, top_p=0.9))
    torch.set_num_threads(before)
    assert all(torch.equal(x_B, y_B) for x_B, y_B in zip(*results))


# --- frequencies ---


def chi_square_limit(freedom: int) -> float:
    """What a right sampler exceeds once in a thousand times, by Wilson and Hilferty; 0.5 % from the tables at 3."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3


def hold_frequencies(backend: str, device: str, num_draws: int, options: dict[str, Any]) -> None:
    """Pearson's test: over positions of one sequence, and over sequences at one position, as a server counts."""
    logits_BV = Rows.random(1, 12, seed=5).logits_BV.div(2).expand(2 * num_draws, 12)
    counter_B = torch.arange(num_draws)
    fixed_B = torch.full_like(counter_B, 41)
    rows = Rows(logits_BV, torch.cat((counter_B, fixed_B)), torch.cat((fixed_B, counter_B)))
    tokens_B = rows.draw(device, seed=11, backend=backend, **options)[0]
    p_V = warped(logits_BV[:1].double(), **options).softmax(1)[0]
    for half_B in tokens_B.split(num_draws):
        count_V = half_B.bincount(minlength=12).double()
        assert not count_V[p_V == 0].any()
        usual_V = p_V * num_draws >= 5  # the seldom ones together, as the test wants it
        expected = torch.cat((p_V[usual_V], p_V[~usual_V].sum()[None])) * num_draws
        count = torch.cat((count_V[usual_V], count_V[~usual_V].sum()[None]))
        present = expected > 0
        statistic = ((count - expected).square() / expected)[present].sum()
        assert statistic < chi_square_limit(int(present.sum()) - 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"top_k": 6},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize(("backend", "device"), c.backends_for("sample_tokens", only=c.FAST, every_isa=True))
def test_frequencies(backend: str, device: str, options: dict[str, Any]) -> None:
    hold_frequencies(backend, device, 3000, options)


@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize(("backend", "device"), c.backends_for("sample_tokens", only=c.INTERPRETED))
def test_frequencies_interpreted(backend: str, device: str, options: dict[str, Any]) -> None:
    """Filters that bisect take 0.2 s a row there; `test_holds` has them."""
    hold_frequencies(backend, device, 60, options)


# --- tracing, refusals ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), c.backends_for("sample_tokens", only=("native",)))
def test_native_op_is_registered_right(backend: str, device: str, dtype: torch.dtype) -> None:
    logits_BV, sequence_B, position_B = (x.to(device) for x in Rows.random(4, 83, dtype))
    options = sample_options(0.7, 10, 0.9, 0.1, 2**64 - 1)
    torch.library.opcheck(torch.ops.alignfast.sample_tokens, (logits_BV, sequence_B, position_B, *options))


@pytest.mark.parametrize(("backend", "device"), c.backends_for("sample_tokens", only=c.FAST))
def test_compiles(backend: str, device: str) -> None:
    rows = Rows.random(4, 83)
    wanted = rows.draw(device, backend=backend, top_p=0.9)
    run = torch.compile(
        lambda: rows.draw(device, backend=backend, top_p=0.9), fullgraph=True, backend="aot_eager"
    )
    for x_B, wanted_B in zip(run(), wanted):
        assert torch.equal(x_B, wanted_B)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("sample_tokens", only=c.FAST))
def test_log_probs_are_constants(backend: str, device: str) -> None:
    rows = Rows.random(4, 83)
    drawn = rows._replace(logits_BV=rows.logits_BV.requires_grad_()).draw(device, backend=backend)
    assert not any(x_B.requires_grad for x_B in drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or a number >= 1e-06, got -1.0"),
        ({"temperature": 1e-9}, "got 1e-09"),
        ({"temperature": math.inf}, "got inf"),
        ({"temperature": math.nan}, "got nan"),
        ({"top_k": -1}, r"top_k must be >= 0 \(0 keeps all\), got -1"),
        ({"top_p": 1.5}, r"top_p must lie in \[0, 1\], got 1.5"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\], got -0.1"),
        ({"seed": -1}, r"seed must lie in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, "got 18446744073709551616"),
        ({"logits_BV": torch.zeros(2, 0)}, r"V >= 1, got torch.float32 \(2, 0\)"),
        ({"logits_BV": torch.zeros(2, 3, dtype=torch.int64)}, "floating-point logits"),
        ({"sequence_B": torch.zeros(3, dtype=torch.int64)}, r"sequence_B must be int64 of shape \(2,\)"),
        ({"position_B": torch.zeros(2, dtype=torch.int32)}, "position_B must be int64.*got torch.int32"),
        ({"backend": "cuda"}, "backend='cuda' is not one of"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    zero_B = torch.zeros(2, dtype=torch.int64)
    arguments: dict[str, Any] = {"logits_BV": torch.zeros(2, 3), "sequence_B": zero_B, "position_B": zero_B}
    arguments |= {"seed": 0} | change
    with pytest.raises(ValueError, match=message):
        sample_tokens(arguments.pop("logits_BV"), **arguments)


# --- properties ---


def hold_any_input(backend: str, device: str, data: st.DataObject, widest: int) -> None:
    """Any small shape, type, spread and options; 16-bit logits and a spread of 0 are full of equals."""
    B, V = data.draw(st.integers(1, 5), "B"), data.draw(st.integers(1, widest), "V")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    rows = Rows.random(B, V, dtype, seed=data.draw(st.integers(0, 2**20), "seed"))
    rows.logits_BV.mul_(data.draw(st.sampled_from([0.0, 0.1, 1.0, 100.0]), "spread"))
    conform(
        backend,
        device,
        rows,
        temperature=data.draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]), "temperature"),
        top_k=data.draw(st.sampled_from([0, 1, 3, 20]), "top_k"),
        # from 1 - 1e-6 on rounding decides for every row
        top_p=data.draw(st.one_of(st.just(1.0), st.floats(0, 0.99)), "top_p"),
        min_p=data.draw(st.one_of(st.just(0.0), st.floats(0, 1)), "min_p"),
    )


@pytest.mark.parametrize(("backend", "device"), c.backends_for("sample_tokens", only=c.COMPILED))
@given(data=st.data())
def test_any_input(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_input(backend, device, data, widest=1200)


@pytest.mark.parametrize(("backend", "device"), c.backends_for("sample_tokens", only=c.INTERPRETED))
@settings(max_examples=10)
@given(data=st.data())
def test_any_input_interpreted(backend: str, device: str, data: st.DataObject) -> None:
    hold_any_input(backend, device, data, widest=40)
