"""The replicas: stock vLLM servers, their supervisor, and the connector that shares their KV cache."""
