"""HTTP towards the replicas: the connection pool, a connection, the heads of answers, the models that are served.

May import http_server and settings.
"""
