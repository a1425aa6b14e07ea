"""The right answers of lesson 18. (The folded solutions in it explain them.)"""

import math

ANSWERS = {
    "18.1": {
        "want": math.log(100) / (0.41 * 0.8),
        "hint": "the logarithm of the norm grows by 0.41 times 0.8 in each step",
        "tol": 0.05,
    },
    "18.2": {
        "want": 1 - 0.95**11,
        "hint": "first find how likely it is that all eleven are right",
    },
    "18.3": {
        "want": 2.1,
        "hint": "divide the rate of M1 by that of M2, both on lab.Toy(a2=2.0)",
        "tol": 0.05,
    },
    "18.4": {
        "want": 8,
        "hint": "take half_time of known(...) for M1, and the difference of the means",
        "tol": 0.2,
    },
}
