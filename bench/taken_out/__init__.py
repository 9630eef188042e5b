"""Mechanisms of planning, each taken out by one file: `python -m bench.beside --model DIR . .:bench/taken_out/words.py`."""
