"""Reward functions as a user may write them, good and bad; imported by name in the rewards' process."""

import os
import time


def length(record, completions):
    return [float(len(text)) for text in completions]


def picky(record, completions):
    """Bad in every way, by the text."""
    values = []
    for text in completions:
        if text == "raise":
            raise RuntimeError("no such luck")
        if text == "hang":
            time.sleep(60)
        if text == "die":
            os._exit(3)
        if text == "exit":
            raise SystemExit(1)
        values.append({"nan": float("nan"), "inf": float("inf")}.get(text, 1.0))
    return values


def broken(record, completions):
    raise KeyError("there is nothing here")


def short(record, completions):
    return [1.0]
