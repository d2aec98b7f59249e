"""Benchmarks: every published number comes from a command here, which measures its baseline in the same run."""
