"""What is worth saying about a machine, and how much it matters."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One thing that matters.

    Attributes:
        level: "error" (training as it is set up cannot work), "warning" or "note".
        about: what it is about, as "TF_CONFIG".
        says: what was found.
        do: what to do; empty where there is nothing.
    """

    level: str
    about: str
    says: str
    do: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)
