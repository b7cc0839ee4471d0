"""`make gpu-pack` and `make gpu-check`: what a machine with a GPU runs, and how it gets there without a network.

`run`, `runner`, `steps` and `images` take the standard library alone: they run before anything is installed.
"""
