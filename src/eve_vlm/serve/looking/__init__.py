"""Where a model looked: rows of attention, words of an answer, maps and drawings."""
