"""What answering and training cost here, beside what they must cost: `eve bench`."""
