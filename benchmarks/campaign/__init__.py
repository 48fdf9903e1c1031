"""The hostile campaign: damaged inputs, kills and full disks against every program, as a table of what happened.

`python -m benchmarks.campaign` from the root of the project; docs/robustness.md says what counts as what.

    stock.py      valid inputs of every kind, made once by the programs themselves
    scenarios.py  which program reads which input, and what its result must equal
    mutations/    what is done to an input, chosen by seed and case number
    zygote.py     a process with everything imported that forks a program with limits; runner.py talks to it
    verdict.py    what counts as refused, crash, hang, unhandled, outside, silent; oracles.py: results
    cases.py      one case from its number; kills.py: kills, second processes and full disks
    table.py      the result as Markdown and JSON
"""
