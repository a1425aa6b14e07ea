"""The right answers of lesson 16. (The folded solutions in it explain them.)"""

ANSWERS = {
    "16.1": {
        "want": 5,
        "hint": "the rate is the variance that the network sees, signal and noise",
    },
    "16.2": {
        "want": 3,
        "hint": "make the network see as much variance along M2 as along M1",
    },
    "16.3": {
        "want": 24,
        "hint": "half_time(looks, seen)[..., 0] has M1 and M2 in its last axis",
        "tol": 1 / 3,
    },
}
