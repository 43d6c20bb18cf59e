"""Benchmarks: `python -m tests.benchmarks [name …] [--quick] [--write]`.

Each number is a ratio of two things measured by turns in one run on one machine, or a count, so that it
says something about the library and little about the machine.
"""
