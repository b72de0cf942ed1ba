"""TensorFlow: synchronization over the replicas of a `tf.distribute` strategy."""

from syncbn._backends.tensorflow.normalization import normalize
from syncbn._backends.tensorflow.values import known_value

__all__ = ["known_value", "normalize"]
