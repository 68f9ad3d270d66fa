"""eve-small, which answers when no model is named: what is shipped, and how it is made whole."""
