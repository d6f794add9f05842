"""Speed beside the peers: one short script a comparison, one command for all: `python -m benchmarks`."""
