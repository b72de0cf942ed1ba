"""Measuring: what `syncbn bench` and the scripts under benchmarks/ share.

Whatever needs a framework imports it inside its functions, so that `syncbn bench --help` and the
drawing of a results page start without one.
"""
