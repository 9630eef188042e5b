"""OpenAI's API as data: what a request's body may hold, the shapes and the routes of the document.

May import errors and token_ids.
"""
