"""Chats rendered by the model's own template. Knows no request."""
