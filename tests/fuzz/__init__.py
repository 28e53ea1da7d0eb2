"""Hostile inputs, made with knowledge of the formats: whatever comes in, it is read or refused in a sentence.

A target is a module with `make`, which turns a row of choices into an input, and `check`, which takes an input and
raises what is wrong with the answer. Anything but a `GraftError` that comes out is wrong, and so are more than two
seconds and more memory than a few times the input (`bounds.py`). `make fuzz` runs all targets; `findings/` holds what
was found once, and tests/test_fuzz.py tries these again, and a few thousand new ones.
"""
