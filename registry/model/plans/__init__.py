"""Plans: the ways to run a network on this machine, and how the fastest proven one is chosen.

A plan is an engine with a precision and a layout. ``base`` says what one is. ``planner`` chooses,
and tries each in a ``benchmark_process``. Every other module holds the plans of one engine and is
found because it is here: a new plan is one new file.
"""
