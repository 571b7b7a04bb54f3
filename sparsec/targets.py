"""What sparsec compiles for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from sparsec.diagnostics import SparsecError


@dataclass(frozen=True)
class Target:
    """A target, written `cpu`, `cuda:sm_90` or `hip:gfx942`.

    Args:
        kind: who runs it: `cpu`, `cuda`, `hip`.
        arch: the chip's architecture, as its vendor writes it; "" for the CPU.
        chips: chips that have it.
    """

    kind: str
    arch: str
    chips: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind

    @property
    def device(self) -> str:
        """The torch device that runs it (PyTorch for ROCm calls its devices `cuda` too)."""
        return "cpu" if self.kind == "cpu" else "cuda"

    def obstacle(self) -> str:
        """Why this machine cannot run it, in a sentence; "" if it can."""
        if self.kind == "cpu":
            return ""
        import torch

        if not torch.cuda.is_available():
            return f"this machine has no GPU that PyTorch {torch.__version__} can use"
        if (self.kind == "hip") != (torch.version.hip is not None):
            return f"this PyTorch is built for {'ROCm' if torch.version.hip else 'CUDA'}"
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = getattr(properties, "gcnArchName", "").split(":")[0]
        if self.kind == "cuda":
            found = f"sm_{properties.major}{properties.minor}"
        return "" if found == self.arch else f"the GPU here is {found}, not {self.arch}"

    def require(self) -> None:
        """Raises: SparsecError if this machine cannot run the target."""
        if reason := self.obstacle():
            raise SparsecError(
                f"a program for {self} cannot run here: {reason}\n"
                f"  hint: save it with .save(PATH) and load it on a machine that has one, or compile for target 'cpu'"
            )

    @staticmethod
    def parse(text: str) -> Target:
        """The target that `text` names. Raises: SparsecError with the ones that there are."""
        for target in TARGETS:
            if str(target) == text:
                return target
        names = [str(target) for target in TARGETS]
        close = difflib.get_close_matches(text, names, n=1)
        meant = f"; did you mean '{close[0]}'?" if close else ""
        raise SparsecError(f"there is no target '{text}'{meant} (there are: {', '.join(names)})")


TARGETS = (
    Target("cpu", "", "any processor that PyTorch runs on"),
    Target("cuda", "sm_80", "NVIDIA A100, A800"),
    Target("cuda", "sm_90", "NVIDIA H100, H200, GH200"),
    Target("cuda", "sm_100", "NVIDIA B200, GB200"),
    Target("hip", "gfx942", "AMD MI300X, MI300A"),
    Target("hip", "gfx950", "AMD MI350X, MI355X"),
)
