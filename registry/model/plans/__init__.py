"""Plans: the ways to run a network on this machine, and how the fastest correct one is chosen.

A plan is an engine with a precision and a device; ``base`` defines it. ``planner`` benchmarks each
plan in a ``benchmark_process`` and chooses. Every other module holds the plans of one engine;
``catalogue`` finds all modules of this folder, so a new plan is one new file.
"""
