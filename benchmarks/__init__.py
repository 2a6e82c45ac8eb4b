"""Benchmarks: correctness first, then time, ceilings and peers in the same run. See docs/benchmarks.md.

attention.py    the attention runner             generation.py       the end to end runner
cases.py        its grammar                      requests.py         its grammar
peers.py        who attends (flex.py: one of)    engines.py          who generates
gate.py         is it right (judge.py: the rule) generation_gate.py  is it right
ceilings.py     what the machine can do

turns.py        rounds, medians                  foreign.py          peers in other environments (workers/)
records.py      CSV                              environment.py      where a row comes from
report.py       the tables of README and docs    plots.py            SVG, as drawing.py draws it
words.py        what they say instead of names
progress.py, options.py   the terminal           gpu/                the same for GPUs, see docs/gpu.md
serving/        many requests at once, on GPUs and CPUs
"""
