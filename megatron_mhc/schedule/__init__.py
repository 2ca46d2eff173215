"""The order of a pipeline step as data, without torch: `pipeline` runs it, `recompute` counts with it.

program.py   the operations of every rank, in order
check.py     whether such programs finish, whatever the timing
plans.py     the program that a model's configuration asks for
stages.py    which layers each stage holds
"""
