"""What every benchmark says of the machine it ran on, without names or paths of it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def software(packages: Sequence[str]) -> dict[str, Any]:
    """Python, those of the packages that are installed, and the commit that is measured."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := _version(name))},
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def slug(name: str) -> str:
    """A chip's name in a file name: `Intel(R) Xeon(R) Processor` is `intel-xeon-processor`."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*", " ", name.lower())).strip("-") or "unknown"


def load() -> float:
    """Processes that wanted to run, on average of the last minute."""
    return round(os.getloadavg()[0], 2)


def text_of(path: Path) -> str:
    """A short file of the system; "" where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False, shell=False
        )
    except OSError:  # no git here
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
