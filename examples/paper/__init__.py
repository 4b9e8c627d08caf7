"""The paper's experiment: every subset of the tasks, every uplink, every protection; ``python -m paper`` in examples."""
