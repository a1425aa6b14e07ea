"""The right answers of lesson 15. (The folded solutions in it explain them.)"""

ANSWERS = {
    "15.1": {
        "want": 0.101,
        "hint": "it is a mean of 0.6 and -0.6; the weights are a softmax",
    },
    "15.2": {
        "want": lambda answer: abs(float(answer)) < 0.01,
        "hint": "how far is the second-nearest training image from a copy?",
    },
    "15.3": {
        "want": lambda answer: 0.9 < float(answer) <= 1,
        "hint": "which of x[:101] is nearest to each sample that is a copy?",
    },
}
