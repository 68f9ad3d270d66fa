"""How much memory a model takes, by part: `eve fits`."""
