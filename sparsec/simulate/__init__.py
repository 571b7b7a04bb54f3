"""What a placement and a schedule take on 8 to 2048 devices, without having them."""

from sparsec.simulate.compute import Device
from sparsec.simulate.experts import Experts, in_order, packed
from sparsec.simulate.layer import Setup, Times
from sparsec.simulate.model import MoE
from sparsec.simulate.run import Point, simulate
from sparsec.simulate.traffic import Traffic, traffic

__all__ = [
    "Device",
    "Experts",
    "MoE",
    "Point",
    "Setup",
    "Times",
    "Traffic",
    "in_order",
    "packed",
    "simulate",
    "traffic",
]
