"""Parts of benchmarks/faults.py: commands, faults, folder snapshots and checks."""
