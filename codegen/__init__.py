"""From lowered IR to what runs: plans, kernels, artifacts."""
