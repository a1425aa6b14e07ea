"""The right answers of lesson 00. (The folded solutions in it explain them.)"""

from superminddpm import DDPM

LINES = ["a = 1", "b = 2  # + sparse", "c = 3  # + reg", "# + sparse is an idea"]

ANSWERS = {
    "00.1": {
        "want": sum(ab > 0.5 for ab in DDPM(None).alphabar.tolist()),
        "hint": "find the first entry of ddpm.alphabar that is at most 0.5",
        "tol": 0,
    },
    "00.2": {
        "want": 1.0,
        "hint": "put 0 in the place of the prediction: what is left?",
        "tol": 0.05,
    },
    "00.3": {
        "want": -0.5,
        "hint": "the average has the least squared error",
    },
    "00.4": {
        "want": "B",
        "hint": "set LOW, HIGH = 1, 400 and run both cells; the answer is a letter",
    },
    "00.5": {
        "want": False,
        "hint": "what does the law say about lines of the parent?",
    },
    "00.6": {
        "want": lambda f: f(LINES, "sparse") == [LINES[0], LINES[2], LINES[3]],
        "hint": 'for "sparse" leave out what ends in "# + sparse", and only that',
    },
}
