"""The plan of a step: which samples are computed together, and which tokens of them."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from redit_fast.packing.plan import MOST_PADDING, Budget, packed, padded, useful_tokens

GROUPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=12),  # three tokens, so that many prompts begin alike
        st.lists(st.integers(1, 15), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=8,
)
BUDGETS = st.one_of(
    st.builds(Budget, st.integers(1, 90), st.none()),
    st.builds(Budget, st.none(), st.integers(1, 9)),
    st.builds(Budget, st.integers(1, 90), st.integers(1, 9)),
    st.just(Budget()),
)


def samples_of(groups):
    """Prompts and completion lengths, one a sample."""
    return [prompt for prompt, lengths in groups for _ in lengths], [n for _, lengths in groups for n in lengths]


def tokens_of(micro, place, texts):
    """The tokens of the segments above a place, and of its own, from the root down."""
    segment = micro.segments[place]
    above = [] if segment.parent is None else tokens_of(micro, segment.parent, texts)
    assert len(above) == segment.start and (segment.parent is None or segment.parent < place)
    return above + texts[segment.sample][segment.start :][: segment.length]


@given(GROUPS, BUDGETS, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_every_token_of_every_sample_is_computed_once(groups, budget, ranks):
    """Those of a completion once in all, but the last, which predicts nothing; those of a prompt once a micro-batch,
    with all that prompts there have in common."""
    prompts, lengths = samples_of(groups)
    texts = [prompt + [100 + i] * n for i, (prompt, n) in enumerate(zip(prompts, lengths))]
    hands = packed(prompts, lengths, budget, ranks=ranks)
    assert len(hands) == ranks
    assert sorted(i for micros in hands for micro in micros for i in micro.samples) == list(range(len(prompts)))
    for micro in (micro for micros in hands for micro in micros):
        assert list(micro.samples) == sorted(micro.samples)
        for sample, end, leaf in zip(micro.samples, micro.prompt_ends, micro.leaves):
            assert tokens_of(micro, end, texts) == prompts[sample]
            assert (leaf is None) == (lengths[sample] == 1)
            if leaf is not None:
                assert tokens_of(micro, leaf, texts) == texts[sample][:-1] and micro.segments[leaf].parent == end
        beginnings = {tuple(prompts[i][:n]) for i in micro.samples for n in range(1, len(prompts[i]) + 1)}
        own = sum(lengths[i] - 1 for i in micro.samples)
        assert micro.tokens == sum(segment.length for segment in micro.segments) == len(beginnings) + own
        assert all(segment.length > 0 for segment in micro.segments)


@given(GROUPS, BUDGETS, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_the_budget_holds_groups_stay_together_and_nothing_is_left_half_empty(groups, budget, ranks):
    prompts, lengths = samples_of(groups)
    most_tokens, most_samples = budget.tokens or 10**9, budget.samples or 10**9
    hands = packed(prompts, lengths, budget, ranks=ranks)
    for micros in hands:
        for micro in micros:
            assert len(micro.samples) == 1 or micro.tokens <= most_tokens
            assert len(micro.samples) <= most_samples
        for one, other in combinations(micros, 2):
            fits = len(one.samples) + len(other.samples) <= most_samples and one.tokens + other.tokens <= most_tokens
            assert not fits
    costs = []
    for prompt in {tuple(prompt) for prompt in prompts}:
        members = [i for i, other in enumerate(prompts) if tuple(other) == prompt]
        costs.append(len(prompt) + sum(lengths[i] - 1 for i in members))
        homes = [(rank, place) for rank, micros in enumerate(hands) for place, micro in enumerate(micros)
                 if set(members) & set(micro.samples)]  # fmt: skip
        assert len({rank for rank, _ in homes}) == 1
        if costs[-1] <= most_tokens and len(members) <= most_samples:
            assert len(homes) == 1
    loads = [
        sum(len(p) for p in {tuple(prompts[i]) for micro in micros for i in micro.samples})
        + sum(lengths[i] - 1 for micro in micros for i in micro.samples)
        for micros in hands
    ]
    assert sum(loads) == sum(costs) and max(loads) - min(loads) <= max(costs)


@given(GROUPS, BUDGETS, st.permutations(range(3)), st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_the_plan_depends_on_lengths_and_on_what_prompts_share(groups, budget, other_tokens, left_out):
    """Not on which tokens they are. What is not chosen is as if it were not there."""
    prompts, lengths = samples_of(groups)
    plan = packed(prompts, lengths, budget)
    assert plan == packed([[other_tokens[t] + 7 for t in prompt] for prompt in prompts], lengths, budget)
    chosen = [i for i in range(len(prompts)) if i != left_out]
    (part,) = packed(prompts, lengths, budget, chosen=chosen)
    (alone,) = packed([prompts[i] for i in chosen], [lengths[i] for i in chosen], budget)
    assert [tuple(chosen[i] for i in micro.samples) for micro in alone] == [micro.samples for micro in part]
    assert [micro.tokens for micro in alone] == [micro.tokens for micro in part]


@given(GROUPS, BUDGETS)
@settings(max_examples=200, deadline=None)
def test_padded_rows_have_like_lengths(groups, budget):
    prompts, lengths = samples_of(groups)
    rows = [len(prompt) + length - 1 for prompt, length in zip(prompts, lengths)]
    (micros,) = padded(prompts, lengths, budget)
    assert sorted(i for micro in micros for i in micro.samples) == list(range(len(prompts)))
    bounds = []
    for micro in micros:
        own = [rows[i] for i in micro.samples]
        bounds.append((max(own), min(own)))
        assert micro.tokens == len(own) * max(own) and micro.segments == ()
        assert len(own) == 1 or micro.tokens <= (budget.tokens or 10**9)
        assert len(own) <= (budget.samples or 10**9)
        assert budget.tokens is None or micro.tokens <= MOST_PADDING * sum(own)
    assert all(low >= high for (_, low), (high, _) in zip(bounds, bounds[1:]))
    assert sum(rows) == useful_tokens(prompts, lengths)


def test_a_system_prompt_is_one_segment_and_a_group_above_the_budget_has_its_prompt_twice():
    system, questions = list(range(50)), [[60, 61], [62], [63, 64, 65]]
    prompts = [system + question for question in questions for _ in range(4)]
    lengths = [11] * 12
    ((micro,),) = packed(prompts, lengths, Budget(tokens=1000))
    assert micro.tokens == 50 + 6 + 12 * 10 and len(micro.segments) == 1 + 3 + 12
    assert [segment.length for segment in micro.segments if segment.parent == 0] == [3, 2, 1]  # the longest first
    (micros,) = packed(prompts[:4], lengths[:4], Budget(tokens=80))
    assert [micro.samples for micro in micros] == [(0, 1), (2, 3)] and [micro.tokens for micro in micros] == [72, 72]
    (micros,) = packed(prompts[:4], lengths[:4], Budget(tokens=5))
    assert [micro.samples for micro in micros] == [(0,), (1,), (2,), (3,)]


def test_a_prompt_that_another_one_begins_with_ends_inside_of_it():
    ((micro,),) = packed([[1, 2, 3], [1, 2, 3, 4], [1, 2]], [3, 1, 2], Budget(tokens=100))
    assert micro.tokens == 4 + 2 + 0 + 1
    assert [tuple(segment) for segment in micro.segments] == [
        (0, 0, 2, None), (2, 2, 1, 0), (0, 2, 1, 0), (0, 3, 2, 2), (1, 3, 1, 2)
    ]  # fmt: skip
    assert micro.prompt_ends == (2, 4, 0) and micro.leaves == (3, None, 1)
