"""The repairs, one file each: `is_needed()` and `patches()`."""
