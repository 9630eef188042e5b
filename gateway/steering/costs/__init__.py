"""What a choice costs in seconds: the terms of the cost model, and how they are fitted. Knows nothing of choices."""
