"""Read at the start of every Python process whose PYTHONPATH names this folder: a service of ours, and its ranks."""

from benchmarks.planted_faults.grafting import install

install()
