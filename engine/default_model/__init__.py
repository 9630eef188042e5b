"""The default model, fetched and converted once: `python -m engine.default_model`. May import host_process and fleet."""
