"""A checkpoint callback whose files need no syncbn to be opened."""

from __future__ import annotations

from typing import Any

import keras

from syncbn.conversion import Custom, reverted

__all__ = ["PortableCheckpoint"]


class PortableCheckpoint(keras.callbacks.ModelCheckpoint):
    """Keras's `ModelCheckpoint`, of files with `BatchNormalization` in place of this layer.

    They open where syncbn is not installed, with the optimizer's state, and weights alone load into
    the model that was not converted, layers within layers too. Inference gives the same bits. The
    model that trains is untouched: it is reverted for the length of the saving.

    Args:
        filepath: as all other arguments, `ModelCheckpoint`'s.
        custom: as in `revert`, for subclasses of SyncBatchNormalization.
        **arguments: `monitor`, `save_best_only`, `save_weights_only`, `save_freq` and so on.

    Raises:
        InputError: before training, a layer that Keras's cannot stand in for; as `revert`.

    References:
        Keras 3, `keras.callbacks.ModelCheckpoint`, whose arguments and file names these are.
    """

    def __init__(self, filepath: Any, *, custom: Custom | None = None, **arguments: Any) -> None:
        super().__init__(filepath, **arguments)
        self._custom = custom

    def set_model(self, model: Any) -> None:
        """Take the model, if it can be reverted: not after the first epoch of many hours."""
        super().set_model(model)
        with self._reverted():
            pass

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save where `save_freq` is a number of batches."""
        if self.save_freq == "epoch":
            return
        with self._reverted():
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save where `save_freq` is "epoch"."""
        with self._reverted():
            super().on_epoch_end(epoch, logs)

    def _reverted(self) -> Any:
        return reverted(self.model, self._custom)
