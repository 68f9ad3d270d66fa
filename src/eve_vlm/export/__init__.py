"""Models for other programs: `eve export`."""
