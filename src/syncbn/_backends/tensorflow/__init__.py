"""TensorFlow: synchronization over the replicas of a `tf.distribute` strategy."""

from syncbn._backends.tensorflow.normalize import normalize_by_global_batch

__all__ = ["normalize_by_global_batch"]
