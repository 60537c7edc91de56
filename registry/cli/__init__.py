"""The commands of ``convoy``: they parse arguments and print results.

May import every folder of ``registry``, but only when a command runs. Decides nothing itself.
"""
