"""The literature's claims, put to the test: a script each, python bench/claims/<claim>.py.

A script measures what its claim is about, point by point, and may be stopped at any time: points
that docs/results/<claim>.json has are not measured again. It then draws a picture beside that file
and writes docs/results.md, of all claims, anew.
"""
