"""The commands of ``python -m registry``: arguments in, a table out.

May import every folder of ``registry``, late. Decides nothing itself.
"""
