"""What the workers compute and the test expects: shapes of both parts, dtype, mode."""

CASES = {
    "uneven": ([(33, 4), (32, 4)], "float32", "graph"),
    "empty": ([(40, 3, 4), (0, 3, 4)], "float32", "graph"),
    "one against many": ([(64, 4), (1, 4)], "float64", "graph"),
    "sizes": ([(2, 9, 7, 3), (3, 4, 5, 3)], "float64", "graph"),
    "eager": ([(9, 4), (4, 4)], "float32", "eager"),
}
