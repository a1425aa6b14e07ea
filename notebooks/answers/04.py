"""The right answers of lesson 04. (The folded solutions in it explain them.)"""

r = 0.9 / 0.999**0.5
ANSWERS = {
    "04.1": {
        "want": r / (1 - r),
        "hint": "the formula of the lesson, with the other value of beta2",
        "tol": 0.006,
    },
    "04.2": {
        "want": 1,
        "hint": "multiply out the square, then take the mean of each term",
    },
    "04.3": {"want": False, "hint": "which rows of the table differ?"},
    "04.4": {
        "want": 0.42,
        "hint": "the last row of what train_masked returns, a mean over either group",
        "tol": 0.15,
    },
}
