"""Whether replicas train a model as one device does, and if not, where they depart and why.

`verifying.py` has the public function. `verdict.py`, and the reports of one, need no framework.
"""
