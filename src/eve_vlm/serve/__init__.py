"""Answering: the engine, and later what serves it."""
