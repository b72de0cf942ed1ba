"""Programs that `syncbn doctor` runs in processes of their own, each on one framework.

They run by the interpreter that is asked about, which may be older than the one of syncbn (Python
3.7 reads them) and know nothing of syncbn: `start.py` is what is run, and hands the rest to them.
"""
