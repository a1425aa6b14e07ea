"""The right answers of lesson 07. (The folded solutions in it explain them.)"""

ANSWERS = {
    "07.1": {
        "want": 2 * (120 + 16 + 1) / 2**16,
        "hint": "14, 15 or 16 heads out of 16, or as many tails",
        "tol": 0.02,
    },
    "07.2": {"want": 0.75, "hint": "only the last stage draws t below 0.2"},
    "07.3": {
        "want": 1.2,
        "hint": "the last share must be three times the sum of the other four",
        "tol": 0.15,
    },
    "07.4": {"want": 128, "hint": "how many seeds halve the half-width?"},
}
