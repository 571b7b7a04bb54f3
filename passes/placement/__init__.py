"""Which rank holds which experts, and how replicas share their tokens."""

from sparsec.passes.placement.loads import Loads, read_loads, read_routing
from sparsec.passes.placement.plan_file import Plan, check_plan, read_plan, write_plan
from sparsec.passes.placement.planner import Options, plan
from sparsec.passes.placement.split import best_split
from sparsec.passes.placement.topology import Topology, parse_topology

__all__ = [
    "Loads",
    "Options",
    "Plan",
    "Topology",
    "best_split",
    "check_plan",
    "parse_topology",
    "plan",
    "read_loads",
    "read_plan",
    "read_routing",
    "write_plan",
]
