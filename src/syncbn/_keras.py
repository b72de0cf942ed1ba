"""What syncbn needs of Keras beyond its public names, in one place."""

from __future__ import annotations

__all__ = ["in_symbolic_scope"]


def in_symbolic_scope() -> bool:
    """Whether Keras only computes shapes now, as while it builds a model from its inputs.

    Keras exports the scope (`keras.SymbolicScope`) but not the question.
    """
    from keras.src.backend.common.symbolic_scope import in_symbolic_scope as keras_answer

    return bool(keras_answer())
