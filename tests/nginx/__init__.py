"""Behind a real nginx, and a real Apache: what the proxy saw of a play is what is reported.

The distribution's own configuration, with the lines of the package added; gunicorn and uWSGI behind it. Clients pace
themselves, for what a proxy knows of one that takes all at once is nothing to judge by.
"""
