"""Language models of others, and what makes an EVE model of one: `eve init`."""
