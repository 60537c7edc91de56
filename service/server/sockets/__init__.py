"""The sockets of one worker: what clients have sent, and what must still be sent to them.

Must not know the application. Imports ``service.server.protocol`` only.
"""
