"""Records and where they come from: pictures, questions and how they become model inputs."""
