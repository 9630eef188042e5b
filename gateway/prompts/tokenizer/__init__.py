"""Text to token ids, with caches of what was tokenised before. Knows no request. May import chat."""
