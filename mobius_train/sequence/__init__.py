"""One clip over several ranks: the shares of its frames and positions, and the exchanges between them."""
