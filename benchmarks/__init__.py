"""`redit-fast bench`: this package's ops beside what they replace, every timed result checked against float64.

clock.py      what is timed: cold and warm caches, the memory that a call adds
measure.py    providers side by side, round by round; a wrong one gets its error and no number
roofline.py   bytes and operations of an op, and what this machine can do at best
growth.py     slopes of time and memory over sizes
peers.py      the other libraries, called as their users call them
bench_*.py    the suites
step_*.py     whole steps of training: what they are measured on, and the providers, each in processes of its own
collectives.py  what ranks send each other
command.py    the command; table.py, plots.py, report.py: what it shows
"""

from redit_fast.extras import need

need("bench", "redit_fast.benchmarks")

SUITES = ("token_loss", "linear_loss", "params", "apply", "advantages", "step", "ranks")  # the most informative first
