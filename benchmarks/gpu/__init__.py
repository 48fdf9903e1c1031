"""All that is claimed of CUDA, measured in one run of minutes: see docs/gpu.md.

    make gpu                                                     # needs a CUDA device
    python -m benchmarks.gpu --parts machine drawing-11m         # some of its parts
    python -m benchmarks.gpu --device cpu                        # a rehearsal at tiny sizes, whose numbers mean nothing
    python -m benchmarks.gpu --table benchmarks/results/gpu/NAME.json

Each part has a process and a time limit of its own. What it found, or how it ended, is written as soon as it ends.
"""
