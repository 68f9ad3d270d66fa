"""Rendered words, documents and charts with questions: pictures that are to be read."""
