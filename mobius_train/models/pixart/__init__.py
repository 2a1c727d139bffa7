"""The transformer of PixArt-α and PixArt-Σ as a backbone, and the ring for it."""
