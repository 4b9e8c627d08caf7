"""The paper's experiment: every subset of the tasks, uplink and protection; ``python -m paper`` in examples."""
