"""The right answers of lesson 14. (The folded solutions in it explain them.)"""

ANSWERS = {
    "14.1": {
        "want": 0.2,
        "hint": "solve the first formula for x_0, with u for eps - x_0",
    },
    "14.2": {
        "want": lambda answer: abs(float(answer)) < 0.01,
        "hint": "what does x_1 say about the pixel?",
    },
    "14.3": {
        "want": 50,
        "hint": "which levels does the logit-normal draw avoid?",
        "tol": 0,
    },
}
