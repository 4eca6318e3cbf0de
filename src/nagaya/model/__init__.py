"""Frozen data that every layer shares. Imports nothing of ours but `errors`.

`typing.NamedTuple`, not `dataclasses`: importing the latter costs 7 ms of a 40 ms `run`.
"""
