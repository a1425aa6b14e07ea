"""The right answers of lesson 13. (The folded solutions in it explain them.)"""

import math

from scipy.stats import t as student


def reach(n):
    """Return the reach of an interval for four arms, n seeds and a spread of 0.2."""
    return student.ppf(1 - 0.025 / 3, 3 * (n - 1)) * 0.2 * math.sqrt(2 / n)


def short_trainings(answer):
    """Return whether these can be scores of two short trainings on digits."""
    one, other = map(float, answer)
    return one != other and all(0.5 < score < 3.5 for score in (one, other))


ANSWERS = {
    "13.1": {"want": 16 * 21 / 4 / 0.05, "hint": "(1/n + 0) d (d + 5) / 4 = 0.05"},
    "13.2": {"want": short_trainings, "hint": "a list of two numbers from score"},
    "13.3": {
        "want": next(n for n in range(2, 1000) if reach(n) <= 0.1),
        "hint": "try n = 2, 3, 4 ... in reach(n, 4)",
        "tol": 0,
    },
    "13.4": {
        "want": 0.055,
        "hint": "only one of ten terms of the mean changes",
        "tol": 0.1,
    },
}
