"""Kills, outages and damage, under load: a promise is what a test has tried to break.

``pytest tests/chaos`` takes about two minutes on two cores; ``pytest tests/chaos --kills 200`` is the long version:
so many kills, and outages of 20 s in place of 10; ``pytest tests/chaos/test_rotations.py --plays 60000`` sends so
many plays through nginx over 20 rotations of its log; ``pytest tests/relay/test_disk_full.py --disk-full 60`` keeps a
disk full for a minute; ``pytest tests/chaos/test_kills.py -k lost_answers --kill-seconds 180`` kills workers and
relays for three minutes. Orders and places are drawn by ``--seed``, which a failing test names.
``pytest -m "not chaos"`` leaves all of this out.
"""
