"""Frames in a directory: append-only segments, whose index is made anew from the frames' own headers at every start."""
