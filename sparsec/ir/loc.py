"""Where an op comes from in the user's program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Loc:
    """A place in the user's source, and the places that were fused into it.

    Args:
        file: path, relative to the import root it was found under (`transformers/models/...`).
        line: 1-based; 0 where it is not known.
        scope: dotted path of the module it ran in (`model.layers.0.mlp`), or "".
        source: the text of that line, for people; it takes no part in equality.
        origins: further places whose ops this op replaced.
    """

    file: str = ""
    line: int = 0
    scope: str = ""
    source: str = field(default="", compare=False)
    origins: tuple[Loc, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.file)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "<unknown>"

    def within(self, scope: str, old: str = "") -> Loc:
        """This place with the module path `old`, which its scope starts with, called `scope`."""
        if old and self.scope != old and not self.scope.startswith(f"{old}."):
            moved = self.scope
        else:
            rest = self.scope.removeprefix(old).removeprefix(".")
            moved = f"{scope}.{rest}" if scope and rest else scope or rest
        origins = tuple(origin.within(scope, old) for origin in self.origins)
        return Loc(self.file, self.line, moved, self.source, origins)

    def alone(self) -> Loc:
        """This place without what was fused into it."""
        return Loc(self.file, self.line, self.scope, self.source) if self.origins else self


UNKNOWN = Loc()


def fuse(locs: Iterable[Loc]) -> Loc:
    """One location for an op that replaces several: the first known place leads, the others are its origins."""
    places: dict[Loc, None] = {}
    for loc in locs:
        for place in (loc.alone(), *loc.origins):
            if place:
                places[place] = None
    if not places:
        return UNKNOWN
    first, *rest = places
    return Loc(first.file, first.line, first.scope, first.source, tuple(rest))
