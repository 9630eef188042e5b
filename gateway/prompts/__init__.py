"""From a request's body to the engine's token ids, and the proof that they are the engine's. May import upstream and api."""
