"""Unified diffs of long texts, in a time that grows with their length.

Python's own matcher looks at every pair of equal lines; here lines that stand once on either side, which most ops do,
are matched first (patience diff), and only what lies between them is left to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import Match, SequenceMatcher

CONTEXT = 3
"""Lines around each change."""


def diff(before: str, after: str, before_name: str = "before", after_name: str = "after") -> str:
    """A unified diff of two texts, with three lines of context; "" for equal ones."""
    return diff_lines(before.splitlines(), after.splitlines(), before_name, after_name)


def diff_lines(a: Sequence[str], b: Sequence[str], before_name: str, after_name: str) -> str:
    """The same of texts as lines without their ends."""
    found = list[str]()
    for group in _Anchored(a, b).get_grouped_opcodes(CONTEXT):
        found.append(f"@@ -{_range(group[0][1], group[-1][2])} +{_range(group[0][3], group[-1][4])} @@\n")
        for tag, i, i_end, j, j_end in group:
            if tag == "equal":
                found += [f" {line}\n" for line in a[i:i_end]]
            else:
                found += [f"-{line}\n" for line in a[i:i_end]]
                found += [f"+{line}\n" for line in b[j:j_end]]
    return f"--- {before_name}\n+++ {after_name}\n{''.join(found)}" if found else ""


def changed_lines(before: str, after: str) -> list[str]:
    """A few lines as they are, each behind two spaces; those that went behind `- `, those that came behind `+ `."""
    a, b, found = before.splitlines(), after.splitlines(), list[str]()
    for tag, i, i_end, j, j_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            found += [f"  {line}" for line in a[i:i_end]]
        else:
            found += [*(f"- {line}" for line in a[i:i_end]), *(f"+ {line}" for line in b[j:j_end])]
    return found


def _range(start: int, stop: int) -> str:
    """Lines as the format wants them: an empty range names the line in front of it."""
    length = stop - start
    first = start + 1 if length else start
    return str(first) if length == 1 else f"{first},{length}"


class _Anchored(SequenceMatcher[str]):
    """A matcher that begins with the lines that are unique on both sides."""

    def __init__(self, a: Sequence[str], b: Sequence[str]) -> None:
        self.matches: list[Match] = []
        super().__init__(None, (), ())
        self.a, self.b = a, b

    def get_matching_blocks(self) -> list[Match]:
        if not self.matches:
            self.matches = [*_joined(self._pieces()), Match(len(self.a), len(self.b), 0)]
        return self.matches

    def _pieces(self) -> Iterator[Match]:
        i = j = 0
        for anchor in [*_anchors(self.a, self.b), (len(self.a), len(self.b))]:
            if i < anchor[0] and j < anchor[1]:
                inner = SequenceMatcher(None, self.a[i : anchor[0]], self.b[j : anchor[1]])
                for block in inner.get_matching_blocks()[:-1]:
                    yield Match(i + block.a, j + block.b, block.size)
            if anchor[0] < len(self.a):
                yield Match(*anchor, 1)
            i, j = anchor[0] + 1, anchor[1] + 1


def _anchors(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """Lines that stand once on either side, as many as keep their order."""
    count_a, count_b = Counter(a), Counter(b)
    place = {line: j for j, line in enumerate(b) if count_b[line] == 1}
    pairs = [(i, place[line]) for i, line in enumerate(a) if count_a[line] == 1 and line in place]
    ends, last, before = list[int](), list[int](), list[int | None]()
    for n, (_, j) in enumerate(pairs):  # the longest increasing subsequence of the j
        at = bisect_left(ends, j)
        before.append(last[at - 1] if at else None)
        ends[at : at + 1], last[at : at + 1] = [j], [n]
    found = list[tuple[int, int]]()
    at_pair = last[-1] if last else None
    while at_pair is not None:
        found.append(pairs[at_pair])
        at_pair = before[at_pair]
    return found[::-1]


def _joined(pieces: Iterator[Match]) -> Iterator[Match]:
    """Matches that touch, as one."""
    held: Match | None = None
    for piece in pieces:
        if held is not None and (held.a + held.size, held.b + held.size) == (piece.a, piece.b):
            held = Match(held.a, held.b, held.size + piece.size)
            continue
        if held is not None:
            yield held
        held = piece
    if held is not None:
        yield held
