"""Kills, outages and damage, under load: each promise is one that a test has tried to break.

``pytest tests/chaos`` takes about two minutes on two cores. Longer versions:

- ``pytest tests/chaos --kills 200``: that many kills, and outages of 20 s instead of 10;
- ``pytest tests/chaos/test_rotations.py --plays 60000``: that many plays through nginx, over 20 rotations of its log;
- ``pytest tests/relay/test_disk_full.py --disk-full 60``: a disk that stays full for a minute;
- ``pytest tests/chaos/test_kills.py -k lost_answers --kill-seconds 180``: kills of workers and relays for three minutes.

Orders and places are drawn by ``--seed``; a failing test prints its seed. ``pytest -m "not chaos"`` leaves all of this out.
"""
