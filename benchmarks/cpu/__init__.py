"""How fast expert layers and models run on this processor, beside other engines: `python -m benchmarks.cpu`."""
