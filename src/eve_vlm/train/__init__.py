"""Training: recipes, parameter groups, the frozen teacher, and the trainer that joins them."""
