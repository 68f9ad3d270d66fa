"""Slow plain-loop versions of everything that EVE invented, to hold the fast ones against.

Written from the description of the mathematics and the shapes of the published weights, one
picture, one cell and one head at a time. Nothing here imports `eve_vlm`, and `test_oracle.py`
holds it against the golden numbers on its own, so a mistake cannot hide in both.
"""
