"""The layer on replicas, by each of Keras's backends; `tests.harness.observe` chooses."""
