"""Who calls, and what they may do. May import settings and errors."""
