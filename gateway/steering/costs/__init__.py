"""How long a request takes, in seconds: the cost model's terms, fitted online from priors. Knows nothing of choices."""
