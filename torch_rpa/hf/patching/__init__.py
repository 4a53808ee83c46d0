"""Putting the engine into a model or a class of them, and taking it out: which ones can be served, and what changes.

Imports go one way: patching -> api -> engine -> model.
"""
