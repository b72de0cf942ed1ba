"""Writes tests/golden/vectors.npz."""

from tests.golden.file import FILE, write

write()
print(f"{FILE.name}: {FILE.stat().st_size / 1000:.0f} kB")
