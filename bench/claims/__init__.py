"""The literature's claims, put to the test: a script each, python bench/claims/<claim>.py.

A script measures what its claim is about, point by point, and may be stopped at any time: points
that docs/results/<claim>.unfinished.json has are not measured again. When all are there that file
becomes <claim>.json; the script draws a picture beside it and writes docs/results.md, of all
claims, anew.
"""
