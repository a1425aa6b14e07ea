"""The right answers of lesson 17. (The folded solutions in it explain them.)"""

ANSWERS = {
    "17.1": {
        "want": 13,
        "hint": "count the 3 x 3 convolutions: each adds one pixel on either side",
    },
    "17.2": {
        "want": 17,
        "hint": "the patches of the two pixels in the middle must be cut, too",
    },
    "17.3": {
        "want": "anywhere 3",
        "hint": "it sees 3 x 3 pixels, and not where they are: compare the four r2",
    },
}
