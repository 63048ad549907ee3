"""Faults put into runs: kills at random moments, damaged files, very many epochs.

    python -m tests.faults --seed 0 --kills 300

Everything is drawn from the seed. Each process is forked from one that has imported torch, so that
a case costs no more than its work. ``make faults`` runs all of it.
"""
