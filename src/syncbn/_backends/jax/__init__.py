"""JAX: synchronization over mapped axes, and over the parts of a `keras.distribution` batch."""

from syncbn._backends.jax.normalization import normalize
from syncbn._backends.jax.values import known_value

__all__ = ["known_value", "normalize"]
