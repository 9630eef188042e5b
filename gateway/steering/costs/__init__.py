"""What a choice costs in seconds: the terms of the cost model and how they are fitted to what was measured. Knows no choice."""
