"""The verb ``convoy classify``: it prints a table of answers, or writes them to a file.

A *source* answers pictures: a running service (``http_source``) or a version of the registry that
this process loads (``local_source``). Modules import heavy packages only when a run needs them.
"""
