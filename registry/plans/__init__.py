"""Plans: the ways to run a network on this machine, and how the fastest proven one is chosen.

A plan is an engine with a precision and a layout. ``plan`` says what one is; every other module but
``choice``, ``trial`` and ``duel`` holds the plans of one engine and is found by being here: adding
a plan touches one file.
"""
