"""Which samples are computed together, and which tokens of them: lengths and prompts to micro-batches, without torch.

A micro-batch is a list of segments that form a trie: a completion hangs on its prompt, and a prompt on what it shares
with the other prompts of the micro-batch, to any depth. A segment's queries are its own tokens; its keys are those of
the segments above it and its own. So every token is computed once.

A completion's last token predicts nothing and is left out; the first is predicted by the prompt's last token.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST_PADDING = 1.05  # times the useful tokens of a padded micro-batch; at 1.05 GSM8K's lengths take some 15 of them


class Budget(NamedTuple):
    """What a micro-batch may hold, unless one sample alone is more; None is no limit."""

    tokens: int | None = None
    samples: int | None = None

    def holds(self, tokens: int, samples: int) -> bool:
        return samples <= (self.samples or samples) and (samples == 1 or tokens <= (self.tokens or tokens))


class Segment(NamedTuple):
    """Tokens start, ..., start + length - 1 of a sample (prompt, then completion), which follow those of `parent`."""

    sample: int
    start: int
    length: int
    parent: int | None  # place of the segment in the micro-batch, before this one


@dataclass(frozen=True)
class MicroBatch:
    samples: tuple[int, ...]  # in ascending order, whatever the layout
    segments: tuple[Segment, ...]  # none: padded rows
    prompt_ends: tuple[int, ...]  # of each sample the segment that ends with its prompt's last token
    leaves: tuple[int | None, ...]  # of each sample the segment of its completion; none where that has one token
    tokens: int  # that the decoder computes, padding included


@dataclass(frozen=True)
class _Unit:
    """Samples of one prompt that stay together."""

    prompt: Sequence[int]
    samples: tuple[int, ...]
    own: int  # tokens beside the prompt's

    @property
    def tokens(self) -> int:
        return len(self.prompt) + self.own


def useful_tokens(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Of a step whose samples are computed one by one, without padding."""
    return sum(len(prompt) + length - 1 for prompt, length in zip(prompts, lengths, strict=True))


def packed(
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    budget: Budget,
    *,
    ranks: int = 1,
    chosen: Sequence[int] | None = None,
) -> list[list[MicroBatch]]:
    """The micro-batches of each rank. What goes where depends on lengths and on what prompts share, on nothing else.

    The samples of a prompt stay together unless they are more than the budget. Whole groups are dealt to the ranks, the
    longest first, each to the rank that has the fewest tokens; then each goes to the rank's first micro-batch with room
    for what it adds.

    Args:
        prompts: of each sample, non-empty; equal ones are one group.
        lengths: of the completions, at least 1.
        ranks: how many processes share the work.
        chosen: the samples to plan; default: all.
    """
    return [_first_fit(units, lengths, budget) for units in deal(_groups(prompts, lengths, chosen), ranks)]


def unscored(packed: bool) -> MicroBatch:
    """One token and no sample, for a rank that has fewer micro-batches than another: all ranks meet in each."""
    return MicroBatch((), (Segment(0, 0, 1, None),) if packed else (), (), (), 1)


def _groups(prompts: Sequence[Sequence[int]], lengths: Sequence[int], chosen: Sequence[int] | None) -> list[_Unit]:
    """The samples of each prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for sample in range(len(prompts)) if chosen is None else chosen:
        groups.setdefault(tuple(prompts[sample]), []).append(sample)
    return [_unit(prompt, samples, lengths) for prompt, samples in groups.items()]


def deal(units: Sequence[_Unit], ranks: int) -> list[list[_Unit]]:
    """The longest first, each to the rank that has the fewest tokens so far."""
    hands: list[list[_Unit]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for unit in _longest_first(units):
        load, rank = heapq.heappop(loads)
        hands[rank].append(unit)
        heapq.heappush(loads, (load + unit.tokens, rank))
    return hands


def padded(
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    budget: Budget,
    *,
    ranks: int = 1,
    chosen: Sequence[int] | None = None,
) -> list[list[MicroBatch]]:
    """As `packed`, with rows of like lengths, the longest first; under a budget of tokens at most `MOST_PADDING` of the
    useful ones."""
    hands = deal(_groups(prompts, lengths, chosen), ranks)
    samples = [sorted(i for unit in hand for i in unit.samples) for hand in hands]
    return [_padded(own, prompts, lengths, budget) for own in samples]


def _padded(
    samples: Sequence[int], prompts: Sequence[Sequence[int]], lengths: Sequence[int], budget: Budget
) -> list[MicroBatch]:
    rows = {i: len(prompts[i]) + lengths[i] - 1 for i in samples}
    found: list[MicroBatch] = []
    part: list[int] = []
    useful = 0
    for sample in sorted(rows, key=lambda i: -rows[i]):
        tokens = (len(part) + 1) * rows[part[0] if part else sample]
        waste = budget.tokens is not None and tokens > MOST_PADDING * (useful + rows[sample])
        if part and (waste or not budget.holds(tokens, len(part) + 1)):
            found.append(_rows(part, len(part) * rows[part[0]]))
            part, useful = [], 0
        part.append(sample)
        useful += rows[sample]
    return found + ([_rows(part, len(part) * rows[part[0]])] if part else [])


def _rows(samples: list[int], tokens: int) -> MicroBatch:
    return MicroBatch(tuple(sorted(samples)), (), (), (), tokens)


def _unit(prompt: Sequence[int], samples: Sequence[int], lengths: Sequence[int]) -> _Unit:
    return _Unit(prompt, tuple(samples), sum(lengths[sample] - 1 for sample in samples))


def _longest_first(units: Sequence[_Unit]) -> list[_Unit]:
    return sorted(units, key=lambda unit: -unit.tokens)


def _first_fit(units: Sequence[_Unit], lengths: Sequence[int], budget: Budget) -> list[MicroBatch]:
    parts = [part for unit in units for part in _split(unit, lengths, budget)]
    bins: list[_Bin] = []
    for unit in _longest_first(parts):
        for each in bins:
            if budget.holds(each.tokens + unit.own, len(each.samples) + len(unit.samples)) and budget.holds(
                each.tokens + each.added(unit), len(each.samples) + len(unit.samples)
            ):
                break
        else:
            bins.append(each := _Bin())
        each.add(unit)
    return [each.micro_batch(lengths) for each in bins]


def _split(unit: _Unit, lengths: Sequence[int], budget: Budget) -> Iterator[_Unit]:
    """Itself, or parts that the budget holds, each of which computes the prompt again."""
    if budget.holds(unit.tokens, len(unit.samples)):
        yield unit
        return
    parts: list[list[int]] = []
    tokens: list[int] = []
    for sample in sorted(unit.samples, key=lambda i: -lengths[i]):
        for place, part in enumerate(parts):
            if budget.holds(tokens[place] + lengths[sample] - 1, len(part) + 1):
                break
        else:
            place, part = len(parts), []
            parts.append(part)
            tokens.append(len(unit.prompt))
        part.append(sample)
        tokens[place] += lengths[sample] - 1
    for part in parts:
        yield _unit(unit.prompt, part, lengths)


@dataclass
class _Node:
    """Tokens start, ..., end - 1 of a prompt, and the prompts that go on behind them, by their next token."""

    sample: int
    prompt: Sequence[int]
    start: int
    end: int
    children: dict[int, _Node]
    samples: tuple[int, ...] = ()  # whose prompt ends here


class _Bin:
    """A micro-batch that is being filled: its prompts as a trie."""

    def __init__(self) -> None:
        self.roots: dict[int, _Node] = {}
        self.samples: list[int] = []
        self.tokens = 0

    def added(self, unit: _Unit) -> int:
        """The tokens that `unit` would add."""
        shared, children = 0, self.roots
        while shared < len(unit.prompt) and (node := children.get(unit.prompt[shared])) is not None:
            shared += _common(node, unit.prompt)
            if shared < node.end:
                break
            children = node.children
        return unit.tokens - shared

    def add(self, unit: _Unit) -> None:
        self.tokens += self.added(unit)
        self.samples += unit.samples
        start, children = 0, self.roots
        while (node := children.get(unit.prompt[start])) is not None:
            start += _common(node, unit.prompt)
            if start < node.end:  # what is shared becomes a node of its own above both
                below = _Node(node.sample, node.prompt, start, node.end, node.children, node.samples)
                node.end, node.children, node.samples = start, {node.prompt[start]: below}, ()
            if start == len(unit.prompt):
                node.samples += unit.samples
                return
            children = node.children
        prompt = unit.prompt
        children[prompt[start]] = _Node(unit.samples[0], prompt, start, len(prompt), {}, unit.samples)

    def micro_batch(self, lengths: Sequence[int]) -> MicroBatch:
        segments: list[Segment] = []
        ends: dict[int, int] = {}
        leaves: dict[int, int | None] = {}
        ahead: list[tuple[_Node, int | None]] = [(node, None) for node in reversed(self.roots.values())]
        while ahead:
            node, parent = ahead.pop()
            place = len(segments)
            segments.append(Segment(node.sample, node.start, node.end - node.start, parent))
            for sample in node.samples:
                ends[sample], leaves[sample] = place, None
                if lengths[sample] > 1:
                    leaves[sample] = len(segments)
                    segments.append(Segment(sample, node.end, lengths[sample] - 1, place))
            ahead += [(child, place) for child in reversed(node.children.values())]
        samples = tuple(sorted(self.samples))
        prompt_ends = tuple(ends[sample] for sample in samples)
        return MicroBatch(samples, tuple(segments), prompt_ends, tuple(leaves[i] for i in samples), self.tokens)


def _common(node: _Node, prompt: Sequence[int]) -> int:
    """How many of the node's tokens `prompt` has too, at their place; its first is one of them."""
    low, high = 1, min(node.end, len(prompt)) - node.start
    while low < high:  # slices compare in C: 1100 tokens take 10 of them
        middle = (low + high + 1) // 2
        if node.prompt[node.start : node.start + middle] == prompt[node.start : node.start + middle]:
            low = middle
        else:
            high = middle - 1
    return low
