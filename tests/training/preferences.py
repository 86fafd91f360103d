"""Pairs of answers with a rule behind them: the chosen one has more of the good words, wherever they stand."""

import json
import random

from redit_fast.training import builtin

GOOD, BAD = ("cards", "coins", "shells"), ("stones", "books", "eggs")


def records(count, seed=0, words=6):
    """Answers of `words` words, two or more good ones apart; the prompts are the demo's."""
    rng = random.Random(seed)
    found = []
    for record in builtin.records(count, held_out=False, seed=seed):
        while True:
            answers = [[rng.choice(GOOD + BAD) for _ in range(words)] for _ in range(2)]
            few, many = sorted(answers, key=goodness)
            if goodness(many) >= goodness(few) + 2:
                break
        found.append({"prompt": record["prompt"], "chosen": " ".join(many), "rejected": " ".join(few)})
    return found


def goodness(words):
    return sum(word in GOOD for word in words)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
