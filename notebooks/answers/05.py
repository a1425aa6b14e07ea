"""The right answers of lesson 05. (The folded solutions in it explain them.)"""

r = 0.9 / 0.999**0.5
ANSWERS = {
    "05.1": {
        "want": r / (1 - r),
        "hint": "the formula of the lesson, with the other value of beta2",
        "tol": 0.006,
    },
    "05.2": {
        "want": 1,
        "hint": "multiply out the square, then take the mean of each term",
    },
    "05.3": {"want": False, "hint": "which rows of the table differ?"},
    "05.4": {
        "want": 0.42,
        "hint": "the last row of what train_masked returns, a mean over either group",
        "tol": 0.15,
    },
}
