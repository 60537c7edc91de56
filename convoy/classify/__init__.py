"""The verb ``convoy classify``: pictures in; a table on the terminal, or a file of answers, out.

A *source* answers pictures: a running service (``http_source``) or a version of the registry that
this process loads (``local_source``). Modules import heavy packages only when a run needs them.
"""
