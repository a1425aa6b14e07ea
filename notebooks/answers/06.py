"""The right answers of lesson 06. (The folded solutions in it explain them.)"""

import numpy as np
from scipy.stats import ttest_rel

G = np.random.default_rng(0)
CASES = [(G.normal(shift, 1, 8), G.normal(0, 1, 8)) for shift in np.linspace(-3, 3, 25)]


def turned_round(answer):
    """More is better now: the verdict of a paired t-test at 5 %, with that sign."""
    for a, b in CASES:
        test = ttest_rel(a, b)
        word = "better" if test.statistic > 0 else "worse"
        if answer(list(a), list(b)) != (word if test.pvalue < 0.05 else "tied"):
            return False
    return True


ANSWERS = {
    "06.1": {
        "want": 2 * (120 + 16 + 1) / 2**16,
        "hint": "14, 15 or 16 heads out of 16, or as many tails",
        "tol": 0.02,
    },
    "06.2": {"want": 0.75, "hint": "only the last stage draws t below 0.2"},
    "06.3": {"want": turned_round, "hint": "what changes if more is better?"},
}
