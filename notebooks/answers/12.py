"""The right answers of lesson 12. (The folded solutions in it explain them.)"""

ANSWERS = {
    "12.1": {"want": 16 * 21 / 4 / 0.05, "hint": "(1/n + 0) d (d + 5) / 4 = 0.05"},
    "12.2": {"want": "tied", "hint": "what is t, and what is q?"},
    "12.3": {"want": 0.05 / 72, "hint": "72 words share the 5 %", "tol": 0.03},
}
