"""HTTP/1.1 towards clients: the protocol on the socket, one cycle for each request, the transaction that answers it.

May import settings, api and errors.
"""
