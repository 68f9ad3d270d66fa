"""What `eve ask` and `eve chat` are made of: pictures by name, files of answers, conversations."""
