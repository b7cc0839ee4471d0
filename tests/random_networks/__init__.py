"""Random networks, whose masked form, graph, compact form and saved form have to compute the same.

    .venv/bin/python -m tests.random_networks --networks 10000 --seed 0

A network is a program: its layers and the lines of its forward, as text. ``recipes_*`` say how a known layer, function
or way of writing becomes lines with random arguments; ``builder`` draws a program from them, ``checks`` compares, and
``faults`` has mistakes to be found.
"""
