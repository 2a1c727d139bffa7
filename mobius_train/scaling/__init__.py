"""What more GPUs bring, on paper: what they send each other, and how long that takes."""
