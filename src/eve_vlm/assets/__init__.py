"""Offline parts: fetched by `eve assets`, never shipped."""
