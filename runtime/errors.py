"""What the runtime raises on purpose. Every text is meant for the user: what is wrong, where, what to do."""

from __future__ import annotations


class ArtifactError(Exception):
    """An artifact or a plan that cannot be run: damaged, of another version or target, or not allowed."""


class InputError(Exception):
    """An argument that the program does not take."""


class RankError(Exception):
    """Another process of the world is dead or does not answer. The world cannot be used any more."""
