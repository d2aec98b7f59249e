"""One driver a module, each run as a process of its own, possibly in a virtual environment of its own.

A driver imports its engine and `bench.peers.pipe`, and nothing else of this project (the one for Sluice aside).
"""
