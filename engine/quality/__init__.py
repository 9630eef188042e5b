"""What codecs do to a model's answers, measured: `python -m engine.quality`, a process that `peerkv quality` starts.

A prefix of real text is computed, its KV goes through frames (`coded_prefix`) or loses tokens (`dropping`), and the text after
it is predicted from what comes out (`comparison`), beside what is predicted from the KV itself. Needs transformers, not vLLM.
"""
