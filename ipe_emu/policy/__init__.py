"""The policy language: parse it, render it, judge by it, and say what is doubtful in it.

parse.py     text -> Policy, byte for byte as the kernel reads it
errors.py    PolicyError: the kernel's errno, what is wrong, where, and what was meant
faults.py    the words of these errors
rule.py      the frozen values that a policy consists of
render.py    Policy -> text
index.py     rules arranged so that the number of them does not slow down a decision
evaluate.py  the decision, as a Verdict
explain.py   the same decision in words, property by property
lint.py      what a person should know about a policy that parses
"""
