"""The right answers of lesson 12. (The folded solutions in it explain them.)"""


def weight(lam, c=0, abar=0.5):
    return (1 - abar) ** 0.5 / (1 + 2 * lam * abar * (1 - c))


ANSWERS = {
    "12.1": {
        "want": 1 - 1 / 2,
        "hint": "2 (1 - rho) (1 - abar) against 1 - abar",
    },
    "12.2": {
        "want": lambda lam: abs(weight(lam) - weight(0) / 2) < 1e-3,
        "hint": "put c = 0 and abar = 0.5 into the formula for w",
    },
    "12.3": {
        "want": lambda ratio: 0.35 < ratio < 0.85,
        "hint": "shared over progressive, both after 150 steps",
    },
}
