"""Every knob of the compiler, once: its keyword, flag, environment variable and meaning.

A value comes from the keyword or flag if given, else from the environment, else from the default here. Three more are
read where they are used, by the runtime as well: `SPARSEC_CXX` (the C++ compiler), `SPARSEC_CACHE` (the folder of what
it made) and `SPARSEC_ISAS` (instruction sets of native code, `avx512,avx2`).
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sparsec.diagnostics import SparsecError

WEIGHTS = ("model", "int8", "int4", "fp8", "mxfp4")
ACTIVATIONS = ("model", "int8", "fp8")
DISPATCHES = ("auto", "none", "rank", "node")
POLICIES = ("static", "local", "batch")
PAYLOADS = ("model", "bf16", "fp8")


@dataclass(frozen=True)
class Config:
    """The knobs. `Config.read(target="cpu")` takes what is not given from the environment."""

    target: str = "cpu"  #: what to compile for: cpu, cuda:sm_80, cuda:sm_90, cuda:sm_100, hip:gfx942, hip:gfx950
    dump: Path | None = None  #: folder that gets the IR after every pass, diffs and a manifest
    override_dir: Path | None = None  #: a run of a dump: IR texts and kernels that were edited in it are used
    verify: bool = True  #: verify the IR after every pass
    weights: str = "model"  #: how experts' weights are stored: model (as is), int8 or int4 (CPU), fp8 or mxfp4 (GPU)
    activations: str = "model"  #: what quantised weights are multiplied by: model (as is), int8 (CPU) or fp8 (GPU)
    invariant: bool = False  #: a row gets the same bits in whatever batch it comes, whatever that costs (GPU)
    devices: str = "1"  #: how many devices run the model together, or nodes x devices of each: 8, 2x4
    plan: Path | None = None  #: a plan of `sparsec plan`: which of the devices holds which experts
    dispatch: str = "auto"  #: a token is sent once for each pick (none), each rank or each node; or auto
    chunks: int = 1  #: parts that the tokens of a layer travel in, one while another is computed
    payload: str = "model"  #: how rows travel to experts: model (as they are), bf16 or fp8
    policy: str = "static"  #: which replica of an expert gets a token: static (the plan's shares), local or batch

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None, **given: Any) -> Config:
        """The configuration for what is `given` (None: not given). Raises: SparsecError for a value that is none."""
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for knob in knobs():
            if knob.name not in values and (text := environ.get(knob.env)):
                values[knob.name] = knob.read(text)
        if values.get("weights", "model") not in WEIGHTS:
            raise SparsecError(f"weights are stored as {', '.join(WEIGHTS)}, not as {values['weights']!r}")
        if values.get("activations", "model") not in ACTIVATIONS:
            raise SparsecError(f"activations are {', '.join(ACTIVATIONS)}, not {values['activations']!r}")
        for name, choices in (("dispatch", DISPATCHES), ("policy", POLICIES), ("payload", PAYLOADS)):
            if (value := values.get(name, choices[0])) not in choices:
                raise SparsecError(f"{name} is one of {', '.join(choices)}, not {value!r}")
        if values.get("chunks", 1) < 1:
            raise SparsecError(f"tokens travel in at least one chunk, not in {values['chunks']}")
        values["devices"] = str(values.get("devices", "1"))
        return cls(**values)

    @property
    def of_banks(self) -> dict[str, str | bool]:
        """The attributes by which a module says how its experts' weights are stored and multiplied (`pack-banks`), and
        whether in one order for all batches (`schedule`)."""
        values = {"weights": self.weights, "activations": self.activations}
        said: dict[str, str | bool] = {name: value for name, value in values.items() if value != "model"}
        return said | ({"invariant": True} if self.invariant else {})


@dataclass(frozen=True)
class Knob:
    """One row of the table."""

    name: str
    default: Any
    doc: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return "SPARSEC_" + self.name.upper()

    def read(self, text: str) -> Any:
        """The value that a variable's text means. Raises: SparsecError."""
        if self.default is None:
            return Path(text)
        if type(self.default) is int:
            if not text.isdecimal():
                raise SparsecError(f"{self.env}={text!r} is no number")
            return int(text)
        if isinstance(self.default, bool):
            if text.lower() not in _BOOLS:
                raise SparsecError(f"{self.env}={text!r} is neither true nor false: write 1 or 0")
            return _BOOLS[text.lower()]
        return text


_BOOLS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


@cache
def knobs() -> tuple[Knob, ...]:
    """Every knob, in the order of `Config`; its meaning is the `#:` comment on its line."""
    docs = dict(re.findall(r"^    (\w+): .*#: (.*)$", inspect.getsource(Config), re.MULTILINE))
    return tuple(Knob(row.name, row.default, docs[row.name]) for row in dataclasses.fields(Config))
