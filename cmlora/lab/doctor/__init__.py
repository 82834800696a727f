"""`cmlora doctor`: is it right, and how fast is it, on the machine that it stands on.

`examination.py` runs three parts, each in a process of its own, so that a kernel that crashes takes nothing with it:
`kernels.py` (every kernel variant against its float64 definition), `composing.py` (the shipped model in every way that
it can run), `speed.py` (libraries against our strategies, launches, bandwidth). `report.py` says what came of it.
"""
