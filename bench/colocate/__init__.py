"""Parts of `python -m bench.colocation`: workload, servers, load, statistics, tables and pictures."""
