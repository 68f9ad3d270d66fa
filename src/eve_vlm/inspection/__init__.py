"""What a model, recipe or picture is made of: `eve inspect`."""
