"""torch: synchronization over the processes of a `torch.distributed` process group."""

from syncbn._backends.torch.collectives import ranks_of
from syncbn._backends.torch.normalization import normalize
from syncbn._backends.torch.values import known_value

__all__ = ["known_value", "normalize", "ranks_of"]
